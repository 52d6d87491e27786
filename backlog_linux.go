package acceptq

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel is what the package asks of Linux only.
type kernel struct {
	getsockopt   func(fd, level, name int, p []byte) (n int, err error)
	attachFilter func(fd int, prog *unix.SockFprog) error
	// getFilter is SO_GET_FILTER: it copies the filter of fd to p and returns its
	// length, or fails with EINVAL if it is longer than p.
	getFilter     func(fd int, p []unix.SockFilter) (n int, err error)
	attachProgram func(fd int, p []unix.SockFilter) error
	detachProgram func(fd int) error
	diag          func(ctx context.Context, request []byte) (rows [][]byte, err error)
	diagSome      func(ctx context.Context, request []byte, keep func(row []byte) bool) (rows [][]byte, err error)
	readFile      func(name string) ([]byte, error)
	unixSocket    func() (fd int, err error)
	namespaceFile func(fd int) (*os.File, error)
	holders       func(file unix.Stat_t) (n int, err error)
}

var realKernel = kernel{
	getsockopt: getsockopt,
	attachFilter: func(fd int, prog *unix.SockFprog) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, prog)
	},
	getFilter:     getFilter,
	attachProgram: attachProgram,
	detachProgram: detachProgram,
	diag:          diag,
	diagSome:      diagSome,
	readFile:      os.ReadFile,
	unixSocket:    unixSocket,
	namespaceFile: namespaceFile,
	holders:       holders,
}

// getsockopt is getsockopt(2) into a buffer; n is the length of the answer.
// unix.GetsockoptTCPInfo allocates its answer, and SO_MEMINFO has no call there.
func getsockopt(fd, level, name int, p []byte) (n int, err error) {
	return getsockoptCounted(fd, level, name, p)
}

// getFilter: the length of this option is in instructions, and not in bytes.
func getFilter(fd int, p []unix.SockFilter) (n int, err error) {
	return getsockoptCounted(fd, unix.SOL_SOCKET, unix.SO_GET_FILTER, p)
}

// getsockoptCounted is getsockopt(2) of an option whose length is in elements of p.
func getsockoptCounted[T any](fd, level, name int, p []T) (n int, err error) {
	size := uint32(len(p))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(size), nil
}

// struct tcp_info of linux/tcp.h, as far as a listener fills it: tcpi_state,
// and for a socket in that state of 10 its queue (tcp_get_info in net/ipv4/tcp.c).
const (
	infoState    = 0  // u8 tcpi_state
	infoUnacked  = 24 // u32 tcpi_unacked: sk_ack_backlog, the connections queued
	infoSacked   = 28 // u32 tcpi_sacked: sk_max_ack_backlog, the limit
	infoQueueEnd = 32
)

// queue reads the accept queue of the listening socket fd. It is not ok where
// TCP_INFO is refused, or is answered as if the socket did not listen: gVisor
// fills it with zeros.
func (sys *system) queue(fd int, p []byte) (queued, limit int, ok bool) {
	n, err := sys.getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil || n < infoQueueEnd || p[infoState] != tcpListen {
		return unknown, unknown, false
	}
	return connections(p[infoUnacked:]), connections(p[infoSacked:]), true
}

// connections is a u32 of the kernel's as an int, which may have 32 bits itself.
func connections(p []byte) int { return saturate(int64(binary.NativeEndian.Uint32(p))) }

// limit reads the limit of the listening socket fd.
func (sys *system) limit(fd int) (limit int, ok bool) {
	var p [infoQueueEnd]byte
	_, limit, ok = sys.queue(fd, p[:])
	return limit, ok
}

// SO_MEMINFO answers with the u32s of linux/sock_diag.h.
const (
	memInfoDrops = 4 * unix.SK_MEMINFO_DROPS
	memInfoEnd   = memInfoDrops + 4
)

// stats reads the accept queue of fd; p is room for one answer of the kernel.
func (sys *system) stats(fd int, tr transport, p []byte) (Stats, error) {
	s := noStats
	var ok bool
	if s.Queued, s.Limit, ok = sys.queue(fd, p); !ok {
		// TCP_INFO of a listener that does not say so is gVisor's.
		if err := sys.mustListen(fd); err != nil {
			return noStats, err
		}
	}
	r, _ := ruleOf(runtime.GOOS)
	s.Capacity = r.capacity(s.Limit)
	if tr == transportUnknown {
		tr = sys.transportOf(fd)
	}
	if tr == plainTCP {
		if n, err := sys.getsockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, p); err == nil && n >= memInfoEnd {
			s.Drops = int64(binary.NativeEndian.Uint32(p[memInfoDrops:]))
		}
	}
	return s, nil
}

// transportOf tells MPTCP, which net.Listen uses by default, from plain TCP.
func (sys *system) transportOf(fd int) transport {
	switch proto, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); {
	case err != nil:
		return transportUnknown
	case proto == unix.IPPROTO_TCP:
		return plainTCP
	}
	return multipathTCP
}

// describe fills in what Linux says of listening besides the ceiling.
func (sys *system) describe(s *System) {
	s.SYNBacklog = sys.ipv4Setting("tcp_max_syn_backlog")
	s.SYNCookies = sys.ipv4Setting("tcp_syncookies")
	s.AbortOnOverflow = sys.ipv4Setting("tcp_abort_on_overflow")
	s.MigrateRequests = sys.ipv4Setting("tcp_migrate_req")

	counter := sys.tcpCounters()
	s.ListenOverflows = counter("ListenOverflows")
	s.ListenDrops = counter("ListenDrops")
	s.ReqQFullDrop = counter("TCPReqQFullDrop")
	s.ReqQFullDoCookies = counter("TCPReqQFullDoCookies")
}

// ipv4Setting reads a number of net.ipv4 that holds in the calling thread's network
// namespace.
func (sys *system) ipv4Setting(name string) int {
	text, _ := sys.readFile("/proc/sys/net/ipv4/" + name)
	n, _ := parseSysctl(string(text)) // unknown, also if there is no text
	return n
}

// tcpCounters reads the counters of the calling thread's network namespace, which are
// told by their column. /proc/net would be the namespace of the process's first thread.
func (sys *system) tcpCounters() func(column string) int64 {
	text, _ := sys.readFile("/proc/thread-self/net/netstat")
	return func(column string) int64 { return netstatCounter(string(text), "TcpExt", column) }
}

// bounds reads the ceiling. /proc/sys/net shows the network namespace of the
// thread that reads it, so the number is that of the sockets made beside it.
func (sys *system) bounds() (ceiling, floor int, err error) {
	const name = "/proc/sys/net/core/somaxconn"
	text, err := sys.readFile(name)
	if err != nil {
		return unknown, 0, err
	}
	if ceiling, err = parseSysctl(string(text)); err != nil {
		return unknown, 0, fmt.Errorf("%s: %w", name, err)
	}
	return ceiling, 0, nil
}
