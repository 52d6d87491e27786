//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// listen makes the socket, from the address to the adoption by net.
func (k *kernel) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	ep, err := k.resolve(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l, err := k.open(ctx, ep, o)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ep.addr(), Err: err}
	}
	l.group.note(ctx, l)
	return l, nil
}

func (k *kernel) open(ctx context.Context, ep endpoint, o *options) (*Listener, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keepAlive, err := k.tryKeepAlive(ep, o.keepAlive)
	if err != nil {
		return nil, err
	}
	if o.strict {
		// Refused before bind where that can be foreseen: nobody sees the port.
		// What the socket says afterwards is the judge all the same.
		if b, err := k.predict(o.backlog); err == nil && b.Clamped() {
			return nil, tooShort(b, k.bounds)
		}
	}
	file, err := k.bindSocket(ep, o)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fd := int(file.Fd())
	account, err := k.listenFor(fd, o.backlog)
	if err != nil {
		return nil, err
	}
	if err := k.setAfterListen(fd, account.Limit, o); err != nil {
		return nil, err
	}
	if o.strict && (account.Clamped() || account.Limit == unknown) {
		return nil, tooShort(account, k.bounds)
	}

	ln, err := k.adopt(file)
	if err != nil {
		return nil, cause(err)
	}
	l, err := newListener(k, ln.(*net.TCPListener), plainTCP, account)
	if err != nil {
		ln.Close()
		return nil, err
	}
	l.strict, l.fastOpen, l.keepAlive = o.strict, o.fastOpen, keepAlive
	l.joinGroup(o)
	l.intake.shown.Store(len(o.controls) > 0)
	return l, nil
}

// bindSocket makes a socket that is bound to ep and does not listen yet.
func (k *kernel) bindSocket(ep endpoint, o *options) (*os.File, error) {
	sa, err := ep.sockaddr()
	if err != nil {
		return nil, err
	}
	fd, err := k.socket(ep.domain())
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
	if err := k.setOptions(fd, ep, o); err != nil {
		return nil, err
	}
	if len(o.controls) > 0 {
		raw, err := file.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := o.callControls(ep.network, ep.addr().String(), raw); err != nil {
			return nil, err
		}
	}
	if err := k.bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	bound = true
	return file, nil
}

// inspect finds out what can be known of a listening socket that was not made
// here.
func (k *kernel) inspect(fd int) (transport, Backlog, error) {
	r := hostRule()
	if err := k.mustListen(fd); err != nil {
		return transportUnknown, Backlog{}, err
	}
	limit, ok := k.limit(fd)
	return k.transportOf(fd), r.account(-1, unknown, limit, ok), nil
}

// mustListen refuses a socket that is not a listening TCP socket. SO_ACCEPTCONN is
// 2 on FreeBSD.
func (k *kernel) mustListen(fd int) error {
	listening, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil && runtime.GOOS == "dragonfly" { // ENOPROTOOPT: DragonFly does not have the option
		return k.mustSeemListening(fd)
	}
	if err != nil {
		return err
	}
	sa, err := k.getsockname(fd)
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
func (k *kernel) mustSeemListening(fd int) error {
	kind, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return err
	}
	sa, err := k.getsockname(fd)
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
	switch _, err := k.getpeername(fd); {
	case err == nil:
		return errNotListening
	case !errors.Is(err, unix.ENOTCONN):
		return os.NewSyscallError("getpeername", err)
	}
	return nil
}
