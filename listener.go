package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A Listener is a TCP listener that knows its accept queue. It is a
// [net.Listener] and a [syscall.Conn], and it has the methods of
// [*net.TCPListener]. Code that needs that type can use [Listener.TCPListener].
//
// A Listener comes from [Listen], [ListenTCP] or [Wrap]. All methods may be called
// concurrently. On a closed, zero or nil Listener every method that can return an
// error does, and Addr returns nil on a zero or nil one.
type Listener struct {
	tcp *net.TCPListener // nil in a zero Listener

	kernel    *kernel
	raw       syscall.RawConn
	transport transport
	strict    bool
	group     membership              // of the SO_REUSEPORT group of its address
	fastOpen  int                     // the qlen of WithFastOpen; 0 without it
	keepAlive *net.KeepAliveConfig    // of accepted connections; nil is net's default
	granted   atomic.Pointer[Backlog] // its Ceiling is not kept: it is read when asked for
	resize    sync.Mutex              // one SetBacklog at a time
	gate      gate
	intake    intake
}

// ListenTCP listens on the TCP address addr, as net.Listen("tcp", addr) does,
// with the accept queue that the options ask for.
func ListenTCP(addr string, opts ...Option) (*Listener, error) {
	return Listen(context.Background(), "tcp", addr, opts...)
}

// Listen listens on a TCP address with the accept queue that the options ask
// for. The network is "tcp", "tcp4" or "tcp6". Addresses, defaults and errors
// are those of [net.ListenConfig.Listen], and ctx is for the resolution of the
// address, as it is there.
//
// These things differ from net.Listen: the backlog is asked for with
// [WithBacklog]; the socket is plain TCP, where net.Listen has used MPTCP
// since Go 1.24 if the kernel offers it; a ctx that has ended, and a zone that
// does not exist, are errors also where net ignores them; and the network in the
// text of errors from Accept is "tcp" in every case.
//
// When less was granted than asked, Listen succeeds and [Listener.Backlog] tells;
// see [WithStrictBacklog]. The error is a [*net.OpError] with Op "listen". A second
// descriptor is needed for a moment, until net has adopted the socket.
func Listen(ctx context.Context, network, address string, opts ...Option) (*Listener, error) {
	return realKernel.listenWith(ctx, network, address, opts)
}

func (k *kernel) listenWith(ctx context.Context, network, address string, opts []Option) (*Listener, error) {
	o, err := checked(ctx, network, opts)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	return k.listen(ctx, network, address, o)
}

// checked is what the options amount to, once all is well that can be judged
// before the address is looked at.
func checked(ctx context.Context, network string, opts []Option) (*options, error) {
	o, err := newOptions(opts)
	if err != nil {
		return nil, err
	}
	if ctx == nil {
		return nil, errors.New("acceptq: nil context")
	}
	return o, checkNetwork(network)
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

// Wrap makes a Listener of one that is listening already: a [*net.TCPListener], such as
// net.Listen's, systemd's or tableflip's, or a *Listener, which is returned as it is.
// They share one socket: closing either closes both.
//
// The Listener counts as shared, since another process may hold the socket, see
// [ErrStillOpen]. If a process was killed while it drained the socket, Wrap lets new
// clients in again. Otherwise it changes nothing, and it copies no descriptor.
// What the first holder asked for is not known, so Requested is -1. Wrap reads the
// limit where the system tells it.
//
// Set deadlines by the Listener from then on: a drain overwrites one that was set
// before, which net does not tell.
//
// A listener of another type that holds a TCP listener, such as that of
// [crypto/tls.NewListener], cannot be wrapped: wrap the one inside it. The error matches
// [syscall.EINVAL] if ln is not a listening TCP socket or is of another type, and
// [net.ErrClosed] if it is closed.
func Wrap(ln net.Listener) (*Listener, error) {
	return realKernel.wrap(ln)
}

func (k *kernel) wrap(ln net.Listener) (*Listener, error) {
	fail := func(err error) (*Listener, error) {
		return nil, &net.OpError{Op: "wrap", Net: "tcp", Err: cause(err)}
	}
	var tcp *net.TCPListener
	switch ln := ln.(type) {
	case *Listener:
		if ln.ok() {
			return ln, nil
		}
		return fail(errNotListening)
	case *net.TCPListener:
		tcp = ln
	case nil, *net.UnixListener:
		return fail(fmt.Errorf("a %T: %w", ln, errNotListening))
	default: // TLS's, or one that reads a PROXY header
		return fail(fmt.Errorf("a %T: wrap the *net.TCPListener inside it instead: %w", ln, errNotListening))
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return fail(errNotListening)
	}
	var (
		tr      transport
		account Backlog
		operr   error
	)
	var left *inheritance
	err = raw.Control(func(fd uintptr) {
		if tr, account, operr = k.inspect(int(fd)); operr == nil {
			left, operr = k.liftLeft(int(fd))
		}
	})
	if err := cmp.Or(err, operr); err != nil {
		return fail(err)
	}
	l, err := newListener(k, tcp, tr, account)
	if err != nil {
		return fail(err)
	}
	l.intake.shared = true
	l.intake.inherited.Store(left)
	return l, nil
}

// newListener makes a Listener over ln. The account is what listening found.
func newListener(k *kernel, ln *net.TCPListener, tr transport, account Backlog) (*Listener, error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, cause(err)
	}
	l := &Listener{tcp: ln, kernel: k, raw: raw, transport: tr}
	l.granted.Store(&account)
	l.gate.moved.L = &l.gate.mu
	return l, nil
}

// socket is nil for a zero and a nil Listener; net's methods return an error then.
func (l *Listener) socket() *net.TCPListener {
	if l == nil {
		return nil
	}
	return l.tcp
}

// ok reports whether l has a socket. As in net, one that is closed still has it.
func (l *Listener) ok() bool { return l.socket() != nil }

// Addr returns the address that l listens on, a [*net.TCPAddr]; nil for a zero
// Listener.
func (l *Listener) Addr() net.Addr {
	if !l.ok() {
		return nil
	}
	return l.tcp.Addr()
}

// Close stops listening, as [net.TCPListener.Close] does: the kernel resets the
// connections that are still queued. Call [Listener.Drain] first to serve them.
func (l *Listener) Close() error {
	if l.ok() {
		if s := l.intake.steering.Load(); s != nil {
			return s.close(l)
		}
	}
	return l.socket().Close()
}

// String returns the network and the address, as in "tcp 127.0.0.1:8080".
func (l *Listener) String() string {
	if !l.ok() {
		return "tcp <nil>"
	}
	return addrString(l.Addr())
}

// TCPListener returns the listener below l, for code that needs that type. They
// share one socket: closing either closes both.
//
// Its Accept bypasses l: [WithKeepAlive] does not apply to the connections that it
// returns, [Listener.Drain] does not wait for them, and one that was made during a
// drain may stay unreadable. Its SetDeadline and File bypass l as well, see
// [Listener.Drain]. It is nil if l is a zero Listener.
func (l *Listener) TCPListener() *net.TCPListener {
	if l.ok() {
		l.intake.shown.Store(true)
	}
	return l.socket()
}

// Accept waits for the next connection and returns it, a [*net.TCPConn].
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptTCP waits for the next connection and returns it.
func (l *Listener) AcceptTCP() (*net.TCPConn, error) {
	if !l.ok() {
		return l.socket().AcceptTCP() // net's error
	}
	for again := false; ; again = true {
		epoch := l.gate.enter(again)
		inherited := l.intake.inherited.Load()
		c, err := l.tcp.AcceptTCP()
		if err == nil {
			l.removeStop(c, inherited)
		}
		if sentOut := l.gate.leave(epoch, err == nil); sentOut && errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err == nil {
			// These fail on a connection that is over already, as net's own does.
			switch k := l.keepAlive; {
			case k == nil:
			case k.Enable:
				c.SetKeepAliveConfig(*k)
			default:
				c.SetKeepAlive(false)
			}
		}
		return c, err
	}
}

// SetDeadline sets the deadline of Accept, as [net.TCPListener.SetDeadline] does.
func (l *Listener) SetDeadline(t time.Time) error {
	if !l.ok() {
		return l.socket().SetDeadline(t) // net's error
	}
	return l.gate.setDeadline(l.tcp, t)
}

// SetBacklog asks for an accept queue of n connections on the live socket, by calling
// listen(2) again, and returns the account after that. A negative n is the maximum
// that the system allows under the current ceiling. Queued connections are kept, even
// if the new limit is smaller than their number: no client is let in until the queue
// has emptied to the new limit. SetBacklog may be called concurrently with Accept.
//
// A listener made with [WithStrictBacklog] keeps its limit if the kernel would grant
// less than n, and the error has a [*ClampError]. So does one made with [WithFastOpen] on
// FreeBSD if half the new limit would be less than its count, and the error matches
// [errors.ErrUnsupported]. After Close the error matches [net.ErrClosed]. On systems
// where net makes the socket the error matches [errors.ErrUnsupported]; one of them is
// Windows, which has no second listen.
func (l *Listener) SetBacklog(n int) (Backlog, error) {
	if !l.ok() {
		return l.Backlog(), l.opError("listen", errNotListening)
	}
	l.resize.Lock()
	defer l.resize.Unlock()
	account := *l.granted.Load()
	var operr error
	err := l.raw.Control(func(fd uintptr) {
		account, operr = l.kernel.setBacklog(int(fd), n, l.strict, l.fastOpen, account)
	})
	l.granted.Store(&account)
	if err := cmp.Or(err, operr); err != nil {
		return l.Backlog(), l.opError("listen", err)
	}
	return l.Backlog(), nil
}

// File returns a copy of the listening socket, as [net.TCPListener.File] does. Use it
// to hand the socket to another process, with the connections in its queue.
//
// From then on l counts as shared: [Listener.Drain] lets new clients in again before it
// returns, and says so by [ErrStillOpen]. If l is draining already, File lets them in.
//
// Calling Fd on the file, as os/exec does for ExtraFiles, makes l itself blocking,
// since they share one socket. Use SyscallConn of the file instead.
func (l *Listener) File() (*os.File, error) {
	if l.ok() {
		if err := l.markShared(); err != nil {
			return nil, l.opError("file", err)
		}
	}
	return l.socket().File()
}

// SyscallConn returns a raw connection, as [net.TCPListener.SyscallConn] does, to read
// or set options of the listening socket.
//
// If a function given to its Control duplicates the descriptor, as tableflip's does, l
// counts as shared from then on, like after [Listener.File]. To find that out on Linux,
// Control looks at each open descriptor of the process. A descriptor that the function
// sends to another process is not seen: send a copy that File returned.
func (l *Listener) SyscallConn() (syscall.RawConn, error) {
	raw, err := l.socket().SyscallConn()
	if err != nil {
		return nil, err
	}
	return watchedConn{raw, l}, nil
}

// A watchedConn notices when its user duplicates the descriptor.
type watchedConn struct {
	syscall.RawConn
	l *Listener
}

func (c watchedConn) Control(f func(fd uintptr)) error {
	err := c.RawConn.Control(f)
	if err == nil && duplicated([]*Listener{c.l})[c.l] {
		err = c.l.markShared()
	}
	return err
}

// itself is l, also for a type that embeds it.
func (l *Listener) itself() *Listener { return l }

// addrString is an address with its network.
func addrString(addr net.Addr) string { return addr.Network() + " " + addr.String() }

// opError is err as net has it.
func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: l.Addr(), Err: cause(err)}
}

// EffectiveBacklog returns the length to which the accept queue may grow, in
// connections, as it was granted when l last called listen(2); -1 if unknown. It
// counts the factor of FreeBSD, where the queue grows to one and a half times
// the limit (listen(2)). One more fits than this on most systems: see
// [Backlog].Capacity.
//
// On Linux and FreeBSD it rests on a number read from the socket, elsewhere on
// the kernel's rule. A ceiling that is raised later does not lengthen the queue
// of a socket that is listening. EffectiveBacklog makes no system call and
// works after Close.
func (l *Listener) EffectiveBacklog() int {
	if !l.ok() {
		return unknown
	}
	return l.granted.Load().Effective
}

// Backlog returns the whole account: what was asked, what was granted, and the
// ceiling, which is read at each call, so that a change of it since then shows.
// A ceiling that cannot be read is -1. It works after Close.
func (l *Listener) Backlog() Backlog {
	if !l.ok() {
		return noBacklog
	}
	account := *l.granted.Load()
	account.Ceiling = l.ceiling()
	return account
}
