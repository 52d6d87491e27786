//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"weak"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
)

// listenFor calls listen(2) for a request of n connections and returns what the kernel
// granted. fd is bound and may already listen. The account has the ceiling only if the
// rule needed it, because Backlog reads the ceiling at each call.
func listenFor(k *sys.Calls, fd, n int) (Backlog, error) {
	r := hostRule()
	if err := k.Listen(fd, r.argument(n)); err != nil {
		return Backlog{}, os.NewSyscallError("listen", err)
	}
	if limit, ok := readLimit(k, fd); ok {
		return r.account(n, unknown, limit, true), nil
	}
	b, _ := predictWith(n, boundsAt(k, fd)) // a bound that cannot be read is unknown, not an error
	return b, nil
}

// boundsAt returns a function that calls readBoundsOf for fd.
func boundsAt(k *sys.Calls, fd int) func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return readBoundsOf(k, fd) }
}

// boundsHere returns a function that calls bounds.
func boundsHere(k *sys.Calls) func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return readBounds(k) }
}

// tooShort returns the error of a strict request for which the kernel grants b.
func tooShort(b Backlog, bounds func() (ceiling, floor int, err error)) error {
	if b.Limit == unknown {
		return fmt.Errorf("WithStrictBacklog: this system does not report the limit: %w", errors.ErrUnsupported)
	}
	r := hostRule()
	ceiling, _, _ := bounds()
	return r.clamp(b.Requested, b.Limit, ceiling)
}

// setBacklog calls listen(2) again on the listening socket fd. It fails without a change
// if the listener is strict and the kernel would grant less than n. It also does so if
// the new limit would be too small for the qlen of TCP Fast Open.
//
// Both are predicted. listen(2) cannot be undone: if the ceiling is lower than the former
// limit, that limit cannot be restored. So setBacklog fails if it needs a prediction and
// cannot make it.
func setBacklog(k *sys.Calls, fd, n int, strict bool, fastOpen int, former Backlog) (Backlog, error) {
	bounds := boundsAt(k, fd)
	strict = strict && n >= 0 // a request for the maximum is never clamped
	if strict || sockopt.FastOpenHalves(runtime.GOOS, fastOpen) {
		b, err := predictWith(n, bounds)
		if err != nil {
			return former, fmt.Errorf("SetBacklog(%d): what the kernel would grant cannot be predicted: %w: %w", n, errors.ErrUnsupported, err)
		}
		if strict && b.Clamped() {
			return former, tooShort(b, bounds)
		}
		if err := fastOpenFits(runtime.GOOS, fastOpen, b.Limit, bounds); err != nil {
			return former, err
		}
	}
	b, err := listenFor(k, fd, n)
	if err != nil {
		return former, err // the limit has not changed
	}
	if strict && (b.Clamped() || b.Limit == unknown) {
		return b, tooShort(b, bounds) // the prediction was wrong
	}
	return b, nil
}

// cappedLength returns the length of a queue for which the kernel reports n. The kernel
// never reports more than most, so from that number on the length is unknown. If most is
// 0 or less, there is no maximum.
func cappedLength(n, most int) int {
	if most > 0 && n >= most {
		return unknown
	}
	return n
}

// fastOpenFits returns an error if a limit is too small for qlen pending connections of
// TCP Fast Open. The error says what to do: a limit above the ceiling needs a higher ceiling
// first.
func fastOpenFits(goos string, qlen, limit int, bounds func() (ceiling, floor int, err error)) error {
	if !sockopt.FastOpenHalves(goos, qlen) || limit == unknown || qlen <= limit/2 {
		return nil
	}
	r, _ := ruleOf(goos)
	fail := func(advice string) error {
		return fmt.Errorf("WithFastOpen(%d): granted %d, half the limit; %s: %w", qlen, limit/2, advice, errors.ErrUnsupported)
	}
	if qlen > r.highest/2 {
		return fail(fmt.Sprintf("this kernel never grants more than %d", r.highest/2))
	}
	backlog := 2 * qlen
	if ceiling, _, err := bounds(); err != nil || ceiling < backlog {
		return fail(fmt.Sprintf("raise the ceiling, %s, and ask for a backlog of %d", r.raise(backlog, unknown), backlog))
	}
	return fail(fmt.Sprintf("ask for a backlog of %d", backlog))
}

// makeShards makes listeners on one address until more returns false.
func makeShards(k *sys.Calls, ctx context.Context, network, addr string, o *options, more func(*Listener) bool) error {
	if _, err := sockopt.ReusePort(); err != nil {
		return &net.OpError{Op: "listen", Net: network, Err: sockopt.Unsupported("ListenShards: more than one shard")}
	}
	ep, err := endpoint.Resolve(k, ctx, network, addr)
	if err != nil {
		return err
	}
	fail := func(err error) error { return &net.OpError{Op: "listen", Net: network, Addr: ep.Addr(), Err: err} }
	if !o.ReusePort {
		if err := sockopt.Spreads(k, ep); err != nil {
			return fail(fmt.Errorf("ListenShards: more than one shard: %w", err))
		}
		alone := o
		sharing := *o
		sharing.ReusePort = true
		o = &sharing
		switch runtime.GOOS {
		case "linux", "android":
			// The first shard listens without the option, so that it fails if another
			// process listens on the address. Then it gets the option, so that the other
			// shards can join. bind(2) alone does not prove that the address is free:
			// two processes can bind to it as long as neither listens.
			l, err := openSocket(k, ctx, ep, alone)
			if err != nil {
				return fail(err)
			}
			ep.At = l.Addr().(*net.TCPAddr).AddrPort()
			operr := l.intake.Raw.Control(func(fd uintptr) { err = sockopt.SetReusePort(k, int(fd)) })
			if err := cmp.Or(operr, err); err != nil {
				l.Close()
				return fail(err)
			}
			l.intake.ReusePort = true
			if !more(l) {
				return nil
			}
		default:
			// A socket without the option reserves the address, because no other socket
			// can bind to it then. Then it gets the option, so that the shards can bind.
			// It never listens: FreeBSD does not assign clients to a socket that was
			// bound without the option.
			claim, err := bindSocket(k, ep, alone)
			if err != nil {
				return fail(err)
			}
			defer claim.Close()
			if err := sockopt.SetReusePort(k, int(claim.Fd())); err != nil {
				return fail(err)
			}
			if ep.At, err = endpoint.Local(k, int(claim.Fd())); err != nil {
				return fail(err)
			}
		}
	}
	most := sockopt.MaxGroup(runtime.GOOS)
	for range most {
		l, err := openSocket(k, ctx, ep, o)
		if err != nil {
			return fail(err)
		}
		ep.At = l.Addr().(*net.TCPAddr).AddrPort()
		if !more(l) {
			return nil
		}
	}
	return fail(sockopt.Unsupported(fmt.Sprintf("ListenShards: more than %d shards", most)))
}

// makeListener resolves the address, makes the socket and passes it to package net.
func makeListener(k *sys.Calls, ctx context.Context, network, addr string, o *options) (*Listener, error) {
	ep, err := endpoint.Resolve(k, ctx, network, addr)
	if err != nil {
		return nil, err
	}
	l, err := openSocket(k, ctx, ep, o)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ep.Addr(), Err: err}
	}
	intake.Welcome(ctx, intakes([]*Listener{l}))
	return l, nil
}

func openSocket(k *sys.Calls, ctx context.Context, ep endpoint.Endpoint, o *options) (l *Listener, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keepAlive, err := sockopt.TryKeepAlive(k, ep, o.KeepAlive)
	if err != nil {
		return nil, err
	}
	if o.strict {
		// If the result can be predicted, fail before bind(2), so that the port is never
		// in use. The limit of the socket is checked below in any case.
		if b, err := predict(k, o.backlog); err == nil && b.Clamped() {
			return nil, tooShort(b, boundsHere(k))
		}
	}
	if o.ReusePort {
		census := sockopt.CensusOf(k)
		seat, err := census.Enter(ep)
		if err != nil {
			return nil, fmt.Errorf("WithReusePort: %w", err)
		}
		defer func() {
			switch {
			case seat == nil:
			case l == nil: // also if a function of WithControl has panicked
				census.Leave(ep, seat)
			default:
				census.Settle(ep, seat, l.Addr().(*net.TCPAddr).AddrPort(), mayBeOpen(weak.Make(l)))
			}
		}()
	}
	file, err := bindSocket(k, ep, o)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fd := int(file.Fd())
	account, err := listenFor(k, fd, o.backlog)
	if err != nil {
		return nil, err
	}
	if err := fastOpenFits(runtime.GOOS, o.FastOpen, account.Limit, boundsHere(k)); err != nil {
		return nil, err
	}
	if err := sockopt.SetAfterListen(k, fd, &o.Options); err != nil {
		return nil, err
	}
	if o.strict && (account.Clamped() || account.Limit == unknown) {
		return nil, tooShort(account, boundsHere(k))
	}

	shared, err := o.sharesPort(k, fd)
	if err != nil {
		return nil, err
	}
	ln, err := k.Adopt(file)
	if err != nil {
		return nil, sys.Cause(err)
	}
	if l, err = newListener(k, ln.(*net.TCPListener), plainTCP, account); err != nil {
		ln.Close()
		return nil, err
	}
	l.strict, l.fastOpen, l.keepAlive = o.strict, o.FastOpen, keepAlive
	l.intake.ReusePort, l.intake.Steers = o.ReusePort || shared, (o.steers || shared) && !o.unsteered
	l.intake.Filtered = sockopt.Filters(runtime.GOOS, &o.Options)
	l.intake.Shown.Store(len(o.controls) > 0)
	return l, nil
}

// mayBeOpen returns a function that asks the socket whether it is open, because code can close
// it without the methods of the Listener. The socket of a Listener that was freed is closed.
func mayBeOpen(p weak.Pointer[Listener]) func() bool {
	return func() bool {
		l := p.Value()
		return l != nil && l.intake.Raw.Control(func(uintptr) {}) == nil
	}
}

// sharesPort reports whether a function of WithControl has set SO_REUSEPORT on fd. A program
// that sets it there, as with net.ListenConfig, is in a group as with WithReusePort.
func (o *options) sharesPort(k *sys.Calls, fd int) (bool, error) {
	name, err := sockopt.ReusePort()
	if len(o.controls) == 0 || o.ReusePort || err != nil {
		return false, nil
	}
	set, err := k.GetInt(fd, unix.SOL_SOCKET, name)
	return err == nil && set != 0, err
}

// bindSocket makes a socket and binds it to ep. It does not listen yet.
func bindSocket(k *sys.Calls, ep endpoint.Endpoint, o *options) (*os.File, error) {
	sa, err := ep.Sockaddr()
	if err != nil {
		return nil, err
	}
	fd, err := k.Socket(ep.Domain())
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
	if err := sockopt.SetBeforeBind(k, fd, ep, &o.Options); err != nil {
		return nil, err
	}
	if len(o.controls) > 0 {
		raw, err := file.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := o.callControls(ep.Network, ep.Addr().String(), raw); err != nil {
			return nil, err
		}
	}
	if err := k.Bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	bound = true
	return file, nil
}

// inspect returns the transport and the account of a listening socket that other code has
// made. It returns an error if fd does not listen.
func inspect(k *sys.Calls, fd int) (transport, Backlog, error) {
	r := hostRule()
	if err := mustListen(k, fd); err != nil {
		return transportUnknown, Backlog{}, err
	}
	limit, ok := readLimit(k, fd)
	return transportOf(k, fd), r.account(MaxBacklog, unknown, limit, ok), nil
}

// mustListen returns an error if fd is not a listening TCP socket. It asks for the address
// last, because some kernels return an error for that of a socket that was reset.
func mustListen(k *sys.Calls, fd int) error {
	listening, err := isListening(k, fd)
	if errors.Is(err, unix.ENOTSOCK) { // such as a pipe
		return fmt.Errorf("%w: %w", err, sys.ErrNotListening)
	}
	if err != nil {
		return err
	}
	if !listening {
		return sys.ErrNotListening
	}
	sa, err := k.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		return nil
	}
	return sys.ErrNotListening
}

// isListening reports whether fd is a listening socket. SO_ACCEPTCONN is 2 on FreeBSD.
func isListening(k *sys.Calls, fd int) (bool, error) {
	n, err := k.GetInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil && runtime.GOOS == "dragonfly" { // ENOPROTOOPT: DragonFly does not have the option
		return hasFilterOption(k, fd)
	}
	return n != 0, err
}

// hasFilterOption is listening for a kernel without SO_ACCEPTCONN. On DragonFly
// SO_ACCEPTFILTER can be read from every listening socket, also without a filter, and from
// no other socket (sogetopt in kern/uipc_socket.c).
func hasFilterOption(k *sys.Calls, fd int) (bool, error) {
	_, err := k.GetInt(fd, unix.SOL_SOCKET, sockopt.SoAcceptFilter)
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}
