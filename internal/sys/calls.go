//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sys

import (
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Calls holds the system calls that this module makes. They are fields of a value, so that
// a test can replace one of them with a call that fails.
type Calls struct {
	Socket        func(domain int) (fd int, err error) // a stream socket, close-on-exec
	SetsockoptInt func(fd, level, name, value int) error
	GetsockoptInt func(fd, level, name int) (int, error)
	Getsockname   func(fd int) (unix.Sockaddr, error)
	Bind          func(fd int, sa unix.Sockaddr) error
	Listen        func(fd, backlog int) error
	Adopt         func(*os.File) (net.Listener, error)
	// Memory holds what a package remembers for as long as the table is used. The type of
	// a key belongs to the package.
	Memory   *sync.Map
	ownCalls // the calls that only this system has
}

// Real is the table of the running kernel.
var Real = Calls{
	Socket:        streamSocket,
	SetsockoptInt: unix.SetsockoptInt,
	GetsockoptInt: unix.GetsockoptInt,
	Getsockname:   unix.Getsockname,
	Bind:          unix.Bind,
	Listen:        unix.Listen,
	Adopt:         net.FileListener,
	Memory:        new(sync.Map),
	ownCalls:      RealOwnCalls,
}

// SetInt calls setsockopt(2).
func (k *Calls) SetInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", k.SetsockoptInt(fd, level, name, value))
}

// GetInt calls getsockopt(2).
func (k *Calls) GetInt(fd, level, name int) (int, error) {
	n, err := k.GetsockoptInt(fd, level, name)
	return n, os.NewSyscallError("getsockopt", err)
}
