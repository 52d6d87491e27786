package acceptq

import (
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ownCalls are the calls that the package makes on Linux only.
type ownCalls struct {
	getsockopt   func(fd, level, name int, p []byte) (n int, err error)
	attachFilter func(fd int, prog *unix.SockFprog) error
	// getFilter is SO_GET_FILTER: it copies the filter of fd to p and returns its
	// length, or fails with EINVAL if it is longer than p.
	getFilter     func(fd int, p []unix.SockFilter) (n int, err error)
	attachProgram func(fd int, p []unix.SockFilter) error
	detachProgram func(fd int) error
	diag          func(request []byte) (diagAnswer, error)
	readFile      func(name string) ([]byte, error)
	unixSocket    func() (fd int, err error)
	namespaceFile func(fd int) (*os.File, error)
	descriptors   func() (counts map[uint64]int, err error)
	clientSocket  func(at unix.Sockaddr, ttl int, deaf bool) (fd int, port uint16, err error)
	connect       func(fd int, to unix.Sockaddr) error
	disconnect    func(fd int, at unix.Sockaddr) error
	reserve       func(fd int, name string) error
}

var realOwnCalls = ownCalls{
	getsockopt: getsockopt,
	attachFilter: func(fd int, prog *unix.SockFprog) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, prog)
	},
	getFilter:     getFilter,
	attachProgram: attachProgram,
	detachProgram: detachProgram,
	diag:          diag,
	readFile:      os.ReadFile,
	unixSocket:    unixSocket,
	namespaceFile: namespaceFile,
	descriptors:   descriptors,
	clientSocket:  clientSocket,
	connect:       unix.Connect,
	disconnect:    disconnect,
	reserve:       reserve,
}

// diagWait is how long a read of the answer of sock_diag(7) may block.
const diagWait = 100 * time.Millisecond

// A diagAnswer is the answer of sock_diag(7) to one request.
type diagAnswer struct {
	receive func(p []byte) (int, error) // reads one datagram; EAGAIN after diagWait
	close   func()
}

// diag sends a netlink message to sock_diag(7). The caller must close the answer.
func diag(request []byte) (a diagAnswer, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return a, err
	}
	wait := unix.NsecToTimeval(diagWait.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	if err == nil {
		err = unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		unix.Close(fd)
		return a, err
	}
	return diagAnswer{
		receive: func(p []byte) (int, error) { return unix.Read(fd, p) },
		close:   func() { unix.Close(fd) },
	}, nil
}

// getsockopt calls getsockopt(2) with the buffer p. n is the length of the answer.
// unix.GetsockoptTCPInfo allocates its answer, and package unix has no call for
// SO_MEMINFO.
func getsockopt(fd, level, name int, p []byte) (n int, err error) {
	return getsockoptCounted(fd, level, name, p)
}

// getFilter reads SO_GET_FILTER, whose length is in instructions and not in bytes.
func getFilter(fd int, p []unix.SockFilter) (n int, err error) {
	return getsockoptCounted(fd, unix.SOL_SOCKET, unix.SO_GET_FILTER, p)
}

// getsockoptCounted calls getsockopt(2) for an option whose length is in elements of p.
func getsockoptCounted[T any](fd, level, name int, p []T) (n int, err error) {
	size := uint32(len(p))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(size), nil
}
