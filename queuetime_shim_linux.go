package acceptq

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// QueueTime stands in for the function of that name until it lands.
func QueueTime(c net.Conn) (time.Duration, error) {
	for range 16 {
		sc, ok := c.(syscall.Conn)
		if !ok {
			w, ok := c.(interface{ NetConn() net.Conn })
			if !ok {
				break
			}
			c = w.NetConn()
			continue
		}
		raw, err := sc.SyscallConn()
		if err != nil {
			return unknown, err
		}
		var info *unix.TCPInfo
		var operr error
		err = raw.Control(func(fd uintptr) {
			info, operr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		})
		if err != nil {
			return unknown, err
		}
		if operr != nil {
			return unknown, operr
		}
		return time.Duration(info.Last_data_sent) * time.Millisecond, nil
	}
	return unknown, syscall.EINVAL
}
