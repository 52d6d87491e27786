package graceful

import (
	"bytes"
	"net"
	"os"
	"strconv"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/unwrap"
	"golang.org/x/sys/unix"
)

// trafficOf asks the kernel about the bytes of a connection, with TCP_INFO and SIOCINQ of
// tcp(7). It does not know those of a connection that hides its socket.
func trafficOf(nc net.Conn) (t traffic, known bool) {
	control(unwrap.Conn(nc), func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		unread, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
		t = traffic{
			received: info.Bytes_received,
			sent:     info.Bytes_sent,
			unread:   err == nil && unread > 0,
			newer:    info.Last_data_recv < info.Last_data_sent, // milliseconds ago
		}
		known = info.State != 0 // gVisor fills in zeros
	})
	return t, known
}

// inodeOf returns the inode of the socket of l, or 0.
func inodeOf(l *acceptq.Listener) (inode uint64) {
	// Control of l itself would check every descriptor of the process.
	control(l.TCPListener(), func(fd uintptr) {
		var s unix.Stat_t
		if unix.Fstat(int(fd), &s) == nil {
			inode = s.Ino
		}
	})
	return inode
}

// listening returns the inodes of the sockets that listen. The kernel lists them in the files
// tcp and tcp6, see proc_net(5).
func listening() map[uint64]bool {
	inodes := make(map[uint64]bool)
	for _, name := range []string{"tcp", "tcp6"} {
		text, _ := os.ReadFile("/proc/thread-self/net/" + name)
		for line := range bytes.Lines(text) {
			if f := bytes.Fields(line); len(f) > 9 && string(f[3]) == "0A" {
				if n, err := strconv.ParseUint(string(f[9]), 10, 64); err == nil && n > 0 {
					inodes[n] = true
				}
			}
		}
	}
	return inodes
}
