package acceptq

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// QueueTime stands in for the function of that name until it lands.
func QueueTime(c syscall.Conn) (time.Duration, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	var operr error
	err = raw.Control(func(fd uintptr) {
		info, operr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if err != nil {
		return 0, err
	}
	if operr != nil {
		return 0, operr
	}
	return time.Duration(info.Last_data_sent) * time.Millisecond, nil
}
