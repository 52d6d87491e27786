package sys

import (
	"cmp"
	"errors"
	"math"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SO_MEMINFO returns an array of u32, linux/sock_diag.h.
const (
	MemInfoDrops = 4 * unix.SK_MEMINFO_DROPS
	MemInfoEnd   = MemInfoDrops + 4
)

// descriptors returns how many descriptors of this process refer to each socket, by
// inode. It checks every descriptor of the process.
func descriptors() (counts map[uint64]int, err error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	counts = make(map[uint64]int)
	for _, name := range names {
		fd, err := ParseNumber(name)
		if err != nil {
			return nil, err
		}
		var s unix.Stat_t
		if unix.Fstat(fd, &s) == nil && s.Mode&unix.S_IFMT == unix.S_IFSOCK {
			counts[s.Ino]++
		}
	}
	return counts, nil
}

// ownCalls are the calls that the package makes on Linux only.
type ownCalls struct {
	Getsockopt   func(fd, level, name int, p []byte) (n int, err error)
	AttachFilter func(fd int, prog *unix.SockFprog) error
	// GetFilter is SO_GET_FILTER: it copies the filter of fd to p and returns its
	// length, or fails with EINVAL if it is longer than p.
	GetFilter     func(fd int, p []unix.SockFilter) (n int, err error)
	AttachProgram func(fd int, p []unix.SockFilter) error
	DetachProgram func(fd int) error
	Diag          func(request []byte) (DiagAnswer, error)
	ReadFile      func(name string) ([]byte, error)
	UnixSocket    func() (fd int, err error)
	NamespaceFile func(fd int) (*os.File, error)
	Descriptors   func() (counts map[uint64]int, err error)
	ClientSocket  func(at unix.Sockaddr, ttl int, deaf bool) (fd int, port uint16, err error)
	Connect       func(fd int, to unix.Sockaddr) error
	Disconnect    func(fd int, at unix.Sockaddr) error
	Reserve       func(fd int, name string) error
}

// RealOwnCalls are the own calls of the running kernel.
var RealOwnCalls = ownCalls{
	Getsockopt: Getsockopt,
	AttachFilter: func(fd int, prog *unix.SockFprog) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, prog)
	},
	GetFilter:     getFilter,
	AttachProgram: AttachProgram,
	DetachProgram: detachProgram,
	Diag:          Diag,
	ReadFile:      os.ReadFile,
	UnixSocket:    unixSocket,
	NamespaceFile: namespaceFile,
	Descriptors:   descriptors,
	ClientSocket:  clientSocket,
	Connect:       unix.Connect,
	Disconnect:    disconnect,
	Reserve:       reserve,
}

// diagWait is how long a read of the answer of sock_diag(7) may block.
const diagWait = 100 * time.Millisecond

// A DiagAnswer is the answer of sock_diag(7) to one request.
type DiagAnswer struct {
	Receive func(p []byte) (int, error) // reads one datagram; EAGAIN after diagWait
	Close   func()
}

// Diag sends a netlink message to sock_diag(7). The caller must close the answer.
func Diag(request []byte) (a DiagAnswer, err error) {
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
	return DiagAnswer{
		Receive: func(p []byte) (int, error) { return unix.Read(fd, p) },
		Close:   func() { unix.Close(fd) },
	}, nil
}

// Getsockopt calls getsockopt(2) with the buffer p. n is the length of the answer.
// unix.GetsockoptTCPInfo allocates its answer, and package unix has no call for
// SO_MEMINFO.
func Getsockopt(fd, level, name int, p []byte) (n int, err error) {
	return getsockoptCounted(fd, level, name, p)
}

// GetFilter reads SO_GET_FILTER, whose length is in instructions and not in bytes.
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

// UnixSocket makes a socket that is used only to read its namespace.
func unixSocket() (int, error) {
	return unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
}

// NamespaceFile opens the network namespace of fd, see SIOCGSKNS in net/socket.c.
func namespaceFile(fd int) (*os.File, error) {
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(ns), "network namespace"), nil
}

// ClientSocket makes a non-blocking socket that is bound to a free port of an address and
// sends with the given TTL. It ignores all packets. If the kernel refuses the filter for that,
// and deaf is false, it ignores packets with a TTL below 255.
func clientSocket(at unix.Sockaddr, ttl int, deaf bool) (fd int, port uint16, err error) {
	domain, level, unicast, minimum := unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MINHOPCOUNT
	if _, v4 := at.(*unix.SockaddrInet4); v4 {
		domain, level, unicast, minimum = unix.AF_INET, unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MINTTL
	}
	fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, 0, os.NewSyscallError("socket", err)
	}
	made := fd
	defer func() {
		if err != nil {
			unix.Close(made)
		}
	}()
	if err := unix.SetsockoptInt(fd, level, unicast, ttl); err != nil {
		return -1, 0, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.SetsockoptInt(fd, level, minimum, math.MaxUint8); err != nil {
		return -1, 0, os.NewSyscallError("setsockopt", err)
	}
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
	if err != nil && deaf {
		return -1, 0, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, at); err != nil {
		return -1, 0, os.NewSyscallError("bind", err)
	}
	switch at, err := unix.Getsockname(fd); at := at.(type) {
	case *unix.SockaddrInet4:
		return fd, uint16(at.Port), nil
	case *unix.SockaddrInet6:
		return fd, uint16(at.Port), nil
	default:
		return -1, 0, os.NewSyscallError("getsockname", cmp.Or(err, error(unix.EAFNOSUPPORT)))
	}
}

// disconnect ends the connection of fd by calling connect(2) with AF_UNSPEC, for which
// package unix has no address. The kernel then frees a port that it has chosen, so disconnect
// binds fd to its former address again.
func disconnect(fd int, at unix.Sockaddr) error {
	address := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&address)), unsafe.Sizeof(address))
	if errno != 0 {
		return errno
	}
	return unix.Bind(fd, at)
}

// reserve binds a unix socket to a name.
func reserve(fd int, name string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: name}) }

// AttachProgram attaches a program to the SO_REUSEPORT group of fd.
func AttachProgram(fd int, p []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]})
}

// DetachProgram detaches the program from the SO_REUSEPORT group of fd. It is not an error
// if there is none.
func detachProgram(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// IPv4Setting reads a number of net.ipv4 in the calling thread's network namespace.
func (k *Calls) IPv4Setting(name string) int {
	n, _ := k.ReadIPv4Setting(name)
	return n
}

// ReadIPv4Setting is IPv4Setting with the error of reading the file.
func (k *Calls) ReadIPv4Setting(name string) (int, error) {
	text, err := k.ReadFile("/proc/sys/net/ipv4/" + name)
	n, _ := ParseNumber(string(text)) // unknown if the text is not a number
	return n, err
}

// TCPCounters reads the counters of the calling thread's network namespace. It returns a
// function that returns one of them.
func (k *Calls) TCPCounters() func(column string) int64 {
	counter, _ := k.ReadTCPCounters()
	return counter
}

// ReadTCPCounters is TCPCounters with the error of reading the file. It does not read
// /proc/net, which shows the namespace of the main thread.
func (k *Calls) ReadTCPCounters() (counter func(column string) int64, err error) {
	text, err := k.ReadFile("/proc/thread-self/net/netstat")
	return func(column string) int64 { return NetstatCounter(string(text), "TcpExt", column) }, err
}
