//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// system is what the package asks of the kernel. It is handed down, so that a
// test can put a failing call in the place of one of them.
type system struct {
	socket        func(domain int) (fd int, err error) // a stream socket, close-on-exec
	setsockoptInt func(fd, level, name, value int) error
	getsockoptInt func(fd, level, name int) (int, error)
	getsockname   func(fd int) (unix.Sockaddr, error)
	getpeername   func(fd int) (unix.Sockaddr, error)
	bind          func(fd int, sa unix.Sockaddr) error
	listenCall    func(fd, backlog int) error
	adopt         func(*os.File) (net.Listener, error)
	// What net makes of an address without a host: an endpoint without an address,
	// by network. net looks at the system for it once in the life of a process, so it
	// is asked once.
	wildcards *sync.Map
	kernel    // what one system only has
}

var realSystem = system{
	socket:        streamSocket,
	setsockoptInt: unix.SetsockoptInt,
	getsockoptInt: unix.GetsockoptInt,
	getsockname:   unix.Getsockname,
	getpeername:   unix.Getpeername,
	bind:          unix.Bind,
	listenCall:    unix.Listen,
	adopt:         net.FileListener,
	wildcards:     new(sync.Map),
	kernel:        realKernel,
}

func (sys *system) setInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", sys.setsockoptInt(fd, level, name, value))
}
