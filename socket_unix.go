//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
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

// listen makes the socket, from the address to the adoption by net.
func (sys *system) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	ep, err := sys.resolve(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l, err := sys.open(ctx, ep, o)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ep.addr(), Err: err}
	}
	noteGroup(ctx, l)
	return l, nil
}

func (sys *system) open(ctx context.Context, ep endpoint, o *options) (*Listener, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keepAlive, err := sys.tryKeepAlive(ep, o.keepAlive)
	if err != nil {
		return nil, err
	}
	if o.strict {
		// Refused before bind where that can be foreseen: nobody sees the port.
		// What the socket says afterwards is the judge all the same.
		if b, err := sys.predict(o.backlog); err == nil && b.Clamped() {
			return nil, tooShort(b, sys.bounds)
		}
	}
	file, err := sys.bindSocket(ep, o)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fd := int(file.Fd())
	account, err := sys.listenAgain(fd, o.backlog)
	if err != nil {
		return nil, err
	}
	if err := sys.setListening(fd, account.Limit, o); err != nil {
		return nil, err
	}
	steers := o.steers && !o.unsteered
	if steers {
		sys.detachProgram(fd) // without a program, or a kernel that has them, there is nothing to take off
	}
	if o.strict && (account.Clamped() || account.Limit == unknown) {
		return nil, tooShort(account, sys.bounds)
	}

	ln, err := sys.adopt(file)
	if err != nil {
		return nil, cause(err)
	}
	l, err := newListener(sys, ln.(*net.TCPListener), plainTCP, account)
	if err != nil {
		ln.Close()
		return nil, err
	}
	l.strict, l.fastOpen, l.keepAlive = o.strict, o.fastOpen, keepAlive
	l.steers = steers
	l.intake.shown.Store(len(o.controls) > 0)
	return l, nil
}

// bindSocket makes a socket that is bound to ep and does not listen yet.
func (sys *system) bindSocket(ep endpoint, o *options) (*os.File, error) {
	sa, err := ep.sockaddr()
	if err != nil {
		return nil, err
	}
	fd, err := sys.socket(ep.domain())
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// The file owns the descriptor from here on, and net gets a copy. It is in
	// blocking mode until then: os would add a non-blocking one to the poller.
	file := os.NewFile(uintptr(fd), "tcp listener")
	bound := false
	defer func() {
		if !bound { // a hook may have panicked
			file.Close()
		}
	}()
	if err := sys.setOptions(fd, ep, o); err != nil {
		return nil, err
	}
	if len(o.controls) > 0 {
		raw, err := file.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := o.control(ep.network, ep.addr().String(), raw); err != nil {
			return nil, err
		}
	}
	if err := sys.bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	bound = true
	return file, nil
}

// listenAgain calls listen(2) for a request of n connections, on a bound socket
// or on one that listens already, and finds out what was granted. The ceiling
// in the account is unknown, for it is read when asked for, except where the
// rule needed it.
func (sys *system) listenAgain(fd, n int) (Backlog, error) {
	r, _ := ruleOf(runtime.GOOS)
	if err := sys.listenCall(fd, r.argument(n)); err != nil {
		return Backlog{}, os.NewSyscallError("listen", err)
	}
	if limit, ok := sys.limit(fd); ok {
		return r.account(n, unknown, limit, true), nil
	}
	b, _ := predict(n, sys.boundsAt(fd)) // what cannot be read is unknown, and not a failure
	return b, nil
}

// boundsAt is boundsOf, to be called later.
func (sys *system) boundsAt(fd int) func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return sys.boundsOf(fd) }
}

// tooShort is the error of a strict request that got b.
func tooShort(b Backlog, bounds func() (ceiling, floor int, err error)) error {
	if b.Limit == unknown {
		return fmt.Errorf("WithStrictBacklog: the limit cannot be known: %w", errors.ErrUnsupported)
	}
	r, _ := ruleOf(runtime.GOOS)
	ceiling, _, _ := bounds()
	return r.clamp(b.Requested, b.Limit, ceiling)
}

// setBacklog calls listen(2) again on the listening socket fd. A strict one is
// left with the limit it had when the kernel would grant less than n. So is one with TCP
// Fast Open whose count of pending connections would become too small.
func (sys *system) setBacklog(fd, n int, strict bool, fastOpen int, former Backlog) (Backlog, error) {
	bounds := sys.boundsAt(fd)
	if strict || fastOpen != 0 {
		if b, err := predict(n, bounds); err == nil {
			if strict && b.Clamped() {
				return former, tooShort(b, bounds)
			}
			if err := fastOpenFits(runtime.GOOS, fastOpen, b.Limit); err != nil {
				return former, err
			}
		}
	}
	b, err := sys.listenAgain(fd, n)
	if err != nil {
		return former, err // what was granted before is granted still
	}
	if !strict || !b.Clamped() && b.Limit != unknown {
		return b, nil
	}
	if former.Limit == unknown {
		return b, tooShort(b, bounds) // there is no way back
	}
	// It could not be foreseen; the way back is the same call.
	back, err := sys.listenAgain(fd, former.Limit)
	if err != nil {
		return b, err
	}
	back.Requested = former.Requested
	return back, tooShort(b, bounds)
}

// adopted finds out what can be known of a listening socket that was not made
// here.
func (sys *system) adopted(fd int) (transport, Backlog, error) {
	r, _ := ruleOf(runtime.GOOS)
	if err := sys.mustListen(fd); err != nil {
		return transportUnknown, Backlog{}, err
	}
	limit, ok := sys.limit(fd)
	return sys.transportOf(fd), r.account(-1, unknown, limit, ok), nil
}

// fastOpenFits refuses a limit that is too small for qlen pending connections of
// TCP Fast Open. FreeBSD allows half the limit, and does not store qlen
// (tcp_fastopen_alloc_counter and syncache_add in netinet). On Linux the count
// does not depend on the limit.
func fastOpenFits(goos string, qlen, limit int) error {
	if goos != "freebsd" || limit == unknown || qlen <= limit/2 {
		return nil
	}
	return fmt.Errorf("WithFastOpen(%d): granted %d, half the limit; ask for a backlog of %d: %w",
		qlen, limit/2, saturate(2*int64(qlen)), errors.ErrUnsupported)
}

// mustListen refuses a socket that is not a listening TCP socket. SO_ACCEPTCONN is
// 2 on FreeBSD.
func (sys *system) mustListen(fd int) error {
	listening, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil && runtime.GOOS == "dragonfly" { // ENOPROTOOPT: DragonFly does not have the option
		return sys.mustSeemListening(fd)
	}
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	sa, err := sys.getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		if listening != 0 {
			return nil
		}
	}
	return errNotListening
}

// mustSeemListening refuses a socket that is certainly not a listening TCP socket,
// where the kernel does not answer SO_ACCEPTCONN: one that is not a stream, that
// is not of an internet family or that has a peer. A socket that is bound and
// neither listens nor is connected passes.
func (sys *system) mustSeemListening(fd int) error {
	kind, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	sa, err := sys.getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		if kind != unix.SOCK_STREAM {
			return errNotListening
		}
	default:
		return errNotListening
	}
	switch _, err := sys.getpeername(fd); {
	case err == nil:
		return errNotListening
	case !errors.Is(err, unix.ENOTCONN):
		return os.NewSyscallError("getpeername", err)
	}
	return nil
}
