//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// listen resolves the address, makes the socket and passes it to package net.
func (k *kernel) listen(ctx context.Context, network, addr string, o *options) (*Listener, error) {
	ep, err := k.resolve(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	l, err := k.open(ctx, ep, o)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ep.addr(), Err: err}
	}
	welcome(ctx, intakes([]*Listener{l}))
	return l, nil
}

func (k *kernel) open(ctx context.Context, ep endpoint, o *options) (l *Listener, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keepAlive, err := k.tryKeepAlive(ep, o.keepAlive)
	if err != nil {
		return nil, err
	}
	if o.strict {
		// If the result can be predicted, fail before bind(2), so that the port is never
		// in use. The limit of the socket is checked below in any case.
		if b, err := k.predict(o.backlog); err == nil && b.Clamped() {
			return nil, tooShort(b, k.boundsHere())
		}
	}
	if o.reusePort && censusOf(k).most < math.MaxInt {
		p, err := censusOf(k).enter(ep)
		if err != nil {
			return nil, fmt.Errorf("WithReusePort: %w", err)
		}
		defer func() {
			if l == nil { // also if a function of WithControl has panicked
				censusOf(k).leave(ep, p)
			} else {
				censusOf(k).settle(ep, p, l)
			}
		}()
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
	if err := fastOpenFits(runtime.GOOS, o.fastOpen, account.Limit, k.boundsHere()); err != nil {
		return nil, err
	}
	if err := k.setAfterListen(fd, &o.settings); err != nil {
		return nil, err
	}
	if o.strict && (account.Clamped() || account.Limit == unknown) {
		return nil, tooShort(account, k.boundsHere())
	}

	ln, err := k.adopt(file)
	if err != nil {
		return nil, cause(err)
	}
	if l, err = newListener(k, ln.(*net.TCPListener), plainTCP, account); err != nil {
		ln.Close()
		return nil, err
	}
	l.strict, l.fastOpen, l.keepAlive = o.strict, o.fastOpen, keepAlive
	l.intake.reusePort, l.intake.steers, l.intake.filtered = o.reusePort, o.steers && !o.unsteered, filters(runtime.GOOS, &o.settings)
	l.intake.shown.Store(len(o.controls) > 0)
	return l, nil
}

// bindSocket makes a socket and binds it to ep. It does not listen yet.
func (k *kernel) bindSocket(ep endpoint, o *options) (*os.File, error) {
	sa, err := ep.sockaddr()
	if err != nil {
		return nil, err
	}
	fd, err := k.socket(ep.domain())
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// The file owns the descriptor from here on, and package net gets a copy. The
	// descriptor is blocking until then, because os would add a non-blocking one to the
	// poller.
	file := os.NewFile(uintptr(fd), "tcp listener")
	bound := false
	defer func() {
		if !bound { // also if a function of WithControl has panicked
			file.Close()
		}
	}()
	if err := k.setOptions(fd, ep, &o.settings); err != nil {
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

// inspect returns the transport and the account of a listening socket that other code has
// made. It returns an error if fd does not listen.
func (k *kernel) inspect(fd int) (transport, Backlog, error) {
	r := hostRule()
	if err := k.mustListen(fd); err != nil {
		return transportUnknown, Backlog{}, err
	}
	limit, ok := k.limit(fd)
	return k.transportOf(fd), r.account(-1, unknown, limit, ok), nil
}

// soAcceptFilter is SO_ACCEPTFILTER, sys/socket.h of the BSDs.
const soAcceptFilter = 0x1000

// mustListen returns an error if fd is not a listening TCP socket. It asks for the address
// last, because some kernels return an error for that of a socket that was reset.
func (k *kernel) mustListen(fd int) error {
	listening, err := k.listening(fd)
	if errors.Is(err, unix.ENOTSOCK) { // such as a pipe
		return fmt.Errorf("%w: %w", err, errNotListening)
	}
	if err != nil {
		return err
	}
	if !listening {
		return errNotListening
	}
	sa, err := k.getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		return nil
	}
	return errNotListening
}

// listening reports whether fd is a listening socket. SO_ACCEPTCONN is 2 on FreeBSD.
func (k *kernel) listening(fd int) (bool, error) {
	n, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil && runtime.GOOS == "dragonfly" { // ENOPROTOOPT: DragonFly does not have the option
		return k.hasFilterOption(fd)
	}
	return n != 0, err
}

// hasFilterOption is listening for a kernel without SO_ACCEPTCONN. On DragonFly
// SO_ACCEPTFILTER can be read from every listening socket, also without a filter, and from
// no other socket (sogetopt in kern/uipc_socket.c).
func (k *kernel) hasFilterOption(fd int) (bool, error) {
	_, err := k.getInt(fd, unix.SOL_SOCKET, soAcceptFilter)
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}
