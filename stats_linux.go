package acceptq

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// readStatsOf reads the accept queue of fd. p is the buffer for an answer of the kernel.
func readStatsOf(k *sys.Calls, fd int, tr transport, p []byte) (Stats, error) {
	s := noStats
	var ok bool
	if s.Queued, s.Limit, ok = readQueue(k, fd, p); !ok {
		// On gVisor TCP_INFO does not show that the socket listens.
		if err := mustListen(k, fd); err != nil {
			return noStats, err
		}
	}
	r := hostRule()
	s.Capacity = r.capacity(s.Limit)
	if tr == transportUnknown {
		tr = transportOf(k, fd)
	}
	if tr == plainTCP {
		if n, err := k.Getsockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, p); err == nil && n >= sys.MemInfoEnd {
			s.Drops = int64(binary.NativeEndian.Uint32(p[sys.MemInfoDrops:]))
		}
	}
	return s, nil
}

// transportOf reports whether fd is MPTCP, which net.Listen uses by default, or plain TCP.
func transportOf(k *sys.Calls, fd int) transport {
	switch proto, err := k.GetInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); {
	case err != nil:
		return transportUnknown
	case proto == unix.IPPROTO_TCP:
		return plainTCP
	}
	return multipathTCP
}

// timeInQueue reads how long the accepted connection fd waited. p is the buffer for the
// kernel's answer.
func timeInQueue(k *sys.Calls, fd int, p []byte) (time.Duration, error) {
	p = p[:tcpinfo.ConnEnd]
	n, err := k.Getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil {
		if proto, perr := k.GetInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); perr == nil && proto != unix.IPPROTO_TCP && proto != unix.IPPROTO_MPTCP {
			return unknown, errNotTCP
		}
		return unknown, os.NewSyscallError("getsockopt", err)
	}
	return tcpinfo.QueueTime(p[:max(0, min(n, len(p)))])
}

// errNotTCP is the error for a connection of another protocol.
var errNotTCP = fmt.Errorf("not a TCP connection: %w", syscall.EINVAL)
