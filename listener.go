package acceptq

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync/atomic"
)

// A Listener is a TCP listener that knows its accept queue. It is a
// [net.Listener] and a [syscall.Conn] with the methods of [*net.TCPListener];
// what asserts that type takes l.TCPListener.
//
// A Listener comes from [Listen] or [ListenTCP]. All methods may be called at
// the same time. On a closed or zero Listener a method that returns an error
// returns one.
type Listener struct {
	*net.TCPListener

	sys     *system
	granted atomic.Pointer[Backlog] // its Ceiling is not kept: it is read when asked for
}

// ListenTCP listens on the TCP address addr, as net.Listen("tcp", addr) does,
// with the accept queue that the options ask for.
func ListenTCP(addr string, opts ...Option) (*Listener, error) {
	return Listen(context.Background(), "tcp", addr, opts...)
}

// Listen listens on a TCP address with the accept queue that the options ask
// for. The network is "tcp", "tcp4" or "tcp6". Addresses, defaults and errors
// are those of [net.ListenConfig.Listen], and ctx is for the resolution of the
// address, as it is there; a ctx that has ended makes Listen fail.
//
// Three things differ from net.Listen: the backlog is asked for with
// [WithBacklog]; the socket is plain TCP, where net.Listen has used MPTCP
// since Go 1.24 if the kernel offers it; and the network in the text of errors
// from Accept is "tcp" in every case.
//
// When less was granted than asked, Listen succeeds and [Listener.Backlog]
// tells; see [WithStrictBacklog]. The error is a [*net.OpError] with Op
// "listen".
func Listen(ctx context.Context, network, address string, opts ...Option) (*Listener, error) {
	return realSystem.listenWith(ctx, network, address, opts)
}

func (sys *system) listenWith(ctx context.Context, network, address string, opts []Option) (*Listener, error) {
	o, err := newOptions(opts)
	if err == nil && ctx == nil {
		err = errors.New("acceptq: nil context")
	}
	if err == nil {
		err = checkNetwork(network)
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	return sys.listen(ctx, network, address, o)
}

// checkNetwork refuses what net.Listen knows and TCP is not. Names that net
// does not know either are left to net, which has the words for them.
func checkNetwork(network string) error {
	switch network {
	case "unix", "unixpacket", "unixgram":
		return net.UnknownNetworkError(network)
	}
	return nil
}

// newListener takes over ln. The account is what listening found.
func newListener(sys *system, ln *net.TCPListener, account Backlog) *Listener {
	l := &Listener{TCPListener: ln, sys: sys}
	l.granted.Store(&account)
	return l
}

// EffectiveBacklog returns the length to which the accept queue may grow, in
// connections, as it was granted when l began to listen; -1 if unknown. It
// counts the factor of FreeBSD, where the queue grows to one and a half times
// the limit (listen(2)). One more fits than this on most systems: see
// [Backlog].Capacity.
//
// On Linux and FreeBSD it rests on a number read from the socket, elsewhere on
// the kernel's rule. A ceiling that is raised later does not lengthen the queue
// of a socket that is listening. EffectiveBacklog makes no system call and
// works after Close.
func (l *Listener) EffectiveBacklog() int {
	if b := l.granted.Load(); b != nil {
		return b.Effective
	}
	return unknown
}

// Backlog returns the whole account: what was asked, what was granted, and the
// ceiling, which is read at each call, so that a change of it since then shows.
// A ceiling that cannot be read is -1. It works after Close.
func (l *Listener) Backlog() Backlog {
	b := l.granted.Load()
	if b == nil {
		r, _ := ruleOf(runtime.GOOS)
		return r.account(-1, unknown, unknown, false)
	}
	account := *b
	account.Ceiling, _, _ = l.sys.bounds()
	return account
}
