package acceptq

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel is what the package asks of Linux only.
type kernel struct {
	getsockopt func(fd, level, name int, p []byte) (n int, err error)
	readFile   func(name string) ([]byte, error)
}

var realKernel = kernel{
	getsockopt: getsockopt,
	readFile:   os.ReadFile,
}

// getsockopt is getsockopt(2) into a buffer; n is the length of the answer.
// unix.GetsockoptTCPInfo allocates its answer, and SO_MEMINFO has no call there.
func getsockopt(fd, level, name int, p []byte) (n int, err error) {
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
	tcpListen    = 10 // TCP_LISTEN, net/tcp_states.h
	infoState    = 0  // u8 tcpi_state
	infoUnacked  = 24 // u32 tcpi_unacked: sk_ack_backlog, the connections queued
	infoSacked   = 28 // u32 tcpi_sacked: sk_max_ack_backlog, the limit
	infoQueueEnd = 32
)

// queue reads the accept queue of the listening socket fd. It is not ok where
// TCP_INFO is refused, or is answered as if the socket did not listen: gVisor
// fills it with zeros.
func (sys *system) queue(fd int, p []byte) (queued, limit int, ok bool) {
	p = p[:infoQueueEnd]
	n, err := sys.getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil || n < infoQueueEnd || p[infoState] != tcpListen {
		return unknown, unknown, false
	}
	return int(saturate32(p[infoUnacked:])), int(saturate32(p[infoSacked:])), true
}

func saturate32(p []byte) int { return saturate(int64(binary.NativeEndian.Uint32(p))) }

// limit reads the limit of the listening socket fd.
func (sys *system) limit(fd int) (limit int, ok bool) {
	var p [infoQueueEnd]byte
	_, limit, ok = sys.queue(fd, p[:])
	return limit, ok
}

// bounds reads the ceiling. /proc/sys/net shows the network namespace of the
// thread that reads it, so the number is that of the sockets made beside it.
func (sys *system) bounds() (ceiling, floor int, err error) {
	text, err := sys.readFile("/proc/sys/net/core/somaxconn")
	if err != nil {
		return unknown, 0, err
	}
	ceiling, err = parseSysctl(string(text))
	return ceiling, 0, err
}
