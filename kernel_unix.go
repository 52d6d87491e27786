//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"os"
	"runtime"
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
//   - stop, stopIntake, lift, stands, removeInherited, removeMigrated, mayReusePort,
//     duplicated and duplicates, which a drain uses to keep new clients out
//   - flight, the handshakes that a drain waits for
//   - steering, place, welcome and leaveSteering, which a drain uses to direct new clients
//     to other listeners
//
// The smallest port is for the systems on which package net makes the socket: see
// the files named *_other.go.
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

// kernel holds the system calls that the package makes. They are fields of a value, so
// that a test can replace one of them with a call that fails.
type kernel struct {
	socket        func(domain int) (fd int, err error) // a stream socket, close-on-exec
	setsockoptInt func(fd, level, name, value int) error
	getsockoptInt func(fd, level, name int) (int, error)
	getsockname   func(fd int) (unix.Sockaddr, error)
	bind          func(fd int, sa unix.Sockaddr) error
	listenCall    func(fd, backlog int) error
	adopt         func(*os.File) (net.Listener, error)
	// withoutHost maps a network to the endpoint that package net chooses for an address
	// without a host. Package net probes the system for it once per process, so the
	// result does not change.
	withoutHost *sync.Map
	census      *census // the sockets of this process that share an address
	ownCalls            // the calls that only this system has
}

var realKernel = kernel{
	socket:        streamSocket,
	setsockoptInt: unix.SetsockoptInt,
	getsockoptInt: unix.GetsockoptInt,
	getsockname:   unix.Getsockname,
	bind:          unix.Bind,
	listenCall:    unix.Listen,
	adopt:         net.FileListener,
	withoutHost:   new(sync.Map),
	census:        &census{most: maxGroup(runtime.GOOS)},
	ownCalls:      realOwnCalls,
}

func (k *kernel) setInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", k.setsockoptInt(fd, level, name, value))
}

func (k *kernel) getInt(fd, level, name int) (int, error) {
	n, err := k.getsockoptInt(fd, level, name)
	return n, os.NewSyscallError("getsockopt", err)
}
