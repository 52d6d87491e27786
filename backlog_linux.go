package acceptq

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// readQueue reads the accept queue of the listening socket fd. ok is false if the kernel
// refuses TCP_INFO, or if the answer does not say that the socket listens. gVisor, for
// example, fills in zeros.
func readQueue(k *sys.Calls, fd int, p []byte) (queued, limit int, ok bool) {
	n, err := k.Getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil || n < tcpinfo.QueueEnd || p[tcpinfo.State] != tcpinfo.Listen {
		return unknown, unknown, false
	}
	return connections(p[tcpinfo.Unacked:]), connections(p[tcpinfo.Sacked:]), true
}

// connections returns a u32 of the kernel as an int, which may have 32 bits.
func connections(p []byte) int { return saturate(int64(binary.NativeEndian.Uint32(p))) }

// readLimit reads the limit of the listening socket fd.
func readLimit(k *sys.Calls, fd int) (limit int, ok bool) {
	var p [tcpinfo.QueueEnd]byte
	_, limit, ok = readQueue(k, fd, p[:])
	return limit, ok
}
