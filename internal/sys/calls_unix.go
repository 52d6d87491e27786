//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sys

import (
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A port is what the package needs from one operating system. A port provides:
//   - the type kernel and its value realKernel: the system calls that the port makes
//   - listen and listenShards, which make listeners
//   - inspect, which looks at a listener that was made elsewhere
//   - setBacklog, which calls listen(2) again
//   - stats and limit, which read the accept queue
//   - bounds and readSettings, which read the system's settings
//   - boundsOf and [Listener].ceiling, which read the settings that apply to one socket
//   - stop, stopIntake, lift, liftLeft, removeInherited, duplicated and stands, which a
//     drain uses to keep new clients out
//   - flight, the handshakes that a drain waits for
//   - steering and detachProgram, which a drain uses to direct new clients to other
//     listeners
//
// The smallest port is for the systems on which package net makes the socket: see
// socket_other.go, drain_other.go and steer_other.go.
//
// The systems of this file make the socket themselves. They share the files *_unix.go
// and one table of system calls. Each of these systems provides:
//   - ownCalls and realOwnCalls: the calls that no other system needs (kernel_linux.go,
//     kernel_bsd.go)
//   - streamSocket, which makes a socket (socket_cloexec.go, socket_forklock.go)
//   - transportOf, which reads a listening socket (backlog_linux.go, backlog_bsd.go)
//   - setBeforeListen, setAfterListen, spreads, bufferKnob and keepAliveNames, which the
//     options need (options_linux.go, options_bsd.go)
//   - a row in ruleOf (backlog.go)

// Calls holds the system calls that the package makes. They are fields of a value, so
// that a test can replace one of them with a call that fails.
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

func (k *Calls) SetInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", k.SetsockoptInt(fd, level, name, value))
}

func (k *Calls) GetInt(fd, level, name int) (int, error) {
	n, err := k.GetsockoptInt(fd, level, name)
	return n, os.NewSyscallError("getsockopt", err)
}
