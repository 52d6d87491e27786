package acceptq

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
)

// A Listener is a TCP listener that reports its accept queue. It implements
// [net.Listener] and [syscall.Conn], and it has the methods of [*net.TCPListener].
// Code that needs the concrete type can use [Listener.TCPListener].
//
// [Listen], [ListenTCP] and [Wrap] return a Listener. All methods may be called
// concurrently. On a closed, zero or nil Listener every method that can return an
// error does. Addr returns nil on a zero or nil Listener.
type Listener struct {
	intake    intake.Intake // the socket, and who may come in; without a socket in a zero Listener
	transport transport
	strict    bool
	fastOpen  int                     // the qlen of WithFastOpen; 0 without it
	keepAlive *net.KeepAliveConfig    // for accepted connections; nil is net's default
	granted   atomic.Pointer[Backlog] // without Ceiling, which is read at each call
	resize    sync.Mutex              // allows one SetBacklog at a time
	accepted  atomic.Uint64           // connections that Accept has returned
}

// ListenTCP listens on the TCP address addr with the accept queue that the options
// request. It is like net.Listen("tcp", addr), see [Listen].
func ListenTCP(addr string, opts ...Option) (*Listener, error) {
	return Listen(context.Background(), "tcp", addr, opts...)
}

// Listen listens on a TCP address with the accept queue that the options request. The
// network is "tcp", "tcp4" or "tcp6". Addresses, defaults and errors are those of
// [net.ListenConfig.Listen]. As there, ctx applies to address resolution only.
//
// If the kernel grants a smaller backlog than requested, Listen succeeds, and
// [Listener.Backlog] reports it. [WithStrictBacklog] makes that an error. Errors are of
// type [*net.OpError] with Op "listen".
//
// Listen differs from [net.Listen] in these points:
//   - The backlog is that of [WithBacklog].
//   - The socket is plain TCP. Since Go 1.24 net.Listen uses MPTCP if the kernel
//     supports it.
//   - It is always an error if ctx has ended or if the zone of the address does not
//     exist. Package net ignores these in some cases. On DragonFly the zone is not
//     checked, because package net finds no interfaces there.
//   - The text of errors from Accept always names the network "tcp".
//   - Listen needs two descriptors until package net has adopted the socket.
func Listen(ctx context.Context, network, address string, opts ...Option) (*Listener, error) {
	return listenWith(&sys.Real, ctx, network, address, opts)
}

func listenWith(k *sys.Calls, ctx context.Context, network, address string, opts []Option) (*Listener, error) {
	o, err := checked(ctx, network, opts)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	return makeListener(k, ctx, network, address, o)
}

// checked returns the options. It fails if an argument is invalid, as far as that can be
// known before the address is resolved.
func checked(ctx context.Context, network string, opts []Option) (*options, error) {
	o, err := newOptions(opts)
	if err != nil {
		return nil, err
	}
	if ctx == nil {
		return nil, errNilContext
	}
	return o, checkNetwork(network)
}

// errNilContext is the error of a call with a nil context.
var errNilContext = fmt.Errorf("nil context: %w", syscall.EINVAL)

// checkNetwork refuses the networks of net.Listen that are not TCP. Package net refuses
// unknown names itself, with its own error.
func checkNetwork(network string) error {
	switch network {
	case "unix", "unixpacket", "unixgram":
		return net.UnknownNetworkError(network)
	}
	return nil
}

// Wrap returns a Listener for ln, a [*net.TCPListener] that net.Listen, systemd or
// another library has made. Both share one socket: closing either closes both. If ln is
// a *Listener, Wrap returns ln itself.
//
// Wrap does not copy the descriptor. If a process was killed while it drained the socket,
// Wrap lets new clients in again. It does not change the socket otherwise. The socket
// counts as shared, because another process may hold it, see [ErrStillOpen]. Requested
// in [Backlog] is [MaxBacklog]. Wrap reads the limit if the system reports it.
//
// Afterwards, set deadlines on the Listener only. A drain replaces a deadline that was
// set on ln, because package net does not report it.
//
// The error matches [net.ErrClosed] if ln is closed. It matches [syscall.EINVAL] if ln
// is not a listening TCP socket or is of another type, such as the listener of
// [crypto/tls.NewListener]. In that case wrap the TCP listener inside it.
func Wrap(ln net.Listener) (*Listener, error) {
	return wrap(&sys.Real, ln)
}

func wrap(k *sys.Calls, ln net.Listener) (*Listener, error) {
	fail := func(err error) (*Listener, error) {
		return nil, &net.OpError{Op: "wrap", Net: "tcp", Err: sys.Cause(err)}
	}
	var tcp *net.TCPListener
	switch ln := ln.(type) {
	case *Listener:
		if !ln.ok() {
			return fail(sys.ErrNotListening)
		}
		if err := ln.intake.Raw.Control(func(uintptr) {}); err != nil {
			return fail(err) // ln is closed
		}
		return ln, nil
	case *net.TCPListener:
		tcp = ln
	case nil, *net.UnixListener:
		return fail(fmt.Errorf("a %T: %w", ln, sys.ErrNotListening))
	default: // such as a listener of crypto/tls, or one that reads a PROXY header
		return fail(fmt.Errorf("a %T; wrap the *net.TCPListener inside it: %w", ln, sys.ErrNotListening))
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return fail(sys.ErrNotListening)
	}
	var (
		tr      transport
		account Backlog
		left    *intake.Stop
		reuse   bool
		operr   error
	)
	err = raw.Control(func(fd uintptr) {
		if tr, account, operr = inspect(k, int(fd)); operr == nil {
			left, operr = intake.Lift(k, int(fd), nil)
		}
		reuse = intake.MayReusePort(k, int(fd))
	})
	if err := cmp.Or(err, operr); err != nil {
		return fail(err)
	}
	l, err := newListener(k, tcp, tr, account)
	if err != nil {
		return fail(err)
	}
	l.intake.Shared = true
	l.intake.ReusePort = reuse
	if left != nil {
		l.intake.Lifted(left)
	}
	return l, nil
}

// newListener returns a Listener for ln with the account of its backlog.
func newListener(k *sys.Calls, ln *net.TCPListener, tr transport, account Backlog) (*Listener, error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, sys.Cause(err)
	}
	l := &Listener{transport: tr}
	l.granted.Store(&account)
	l.intake.Init(k, ln, raw, tr == multipathTCP, l.queue)
	return l, nil
}

// socket returns nil for a zero or nil Listener. The methods of a nil *net.TCPListener
// return an error.
func (l *Listener) socket() *net.TCPListener {
	if l == nil {
		return nil
	}
	return l.intake.TCP
}

// ok reports whether l has a socket. A closed Listener has one, as in package net.
func (l *Listener) ok() bool { return l.socket() != nil }

// Addr returns the address that l listens on, a [*net.TCPAddr]. It returns nil for a
// zero Listener.
func (l *Listener) Addr() net.Addr {
	if !l.ok() {
		return nil
	}
	return l.intake.TCP.Addr()
}

// Close stops listening, as [net.TCPListener.Close] does: the kernel resets the
// connections that are still queued. Call [Listener.Drain] first to serve them.
func (l *Listener) Close() error {
	if l.ok() {
		if s := l.intake.Steering.Load(); s != nil {
			return s.CloseListener(&l.intake)
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

// TCPListener returns the [*net.TCPListener] that l uses, for code that needs this type.
// Both share one socket: closing either closes both. For a zero Listener it returns nil.
//
// To drain l, call Accept, SetDeadline and File on l only. The Accept method of the
// TCPListener has these limitations:
//   - [WithKeepAlive] does not apply to the connections.
//   - [Listener.Drain] does not wait for the connections.
//   - A connection made during a drain may receive no data.
func (l *Listener) TCPListener() *net.TCPListener {
	if l.ok() {
		l.lend()
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
		epoch := l.intake.Gate.Enter(again)
		inherited := l.intake.Inherited.Load()
		c, err := l.intake.TCP.AcceptTCP()
		if err == nil {
			l.intake.RemoveStop(c, inherited)
			l.noteLocal(c)
		}
		if l.intake.Gate.Leave(epoch, err) {
			continue
		}
		if err == nil {
			l.accepted.Add(1)
			// As in package net, an error is ignored: the connection may have ended.
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

// noteLocal notes whether l gets clients of other local ports or addresses than its own,
// as a BPF program of type sk_lookup can arrange. It makes no system call.
func (l *Listener) noteLocal(c *net.TCPConn) {
	own, ok1 := l.intake.TCP.Addr().(*net.TCPAddr)
	local, ok2 := c.LocalAddr().(*net.TCPAddr)
	if ok1 && ok2 && (local.Port != own.Port || !own.IP.IsUnspecified() && !local.IP.Equal(own.IP)) {
		l.intake.Elsewhere.Store(true)
	}
}

// Accepted returns the number of connections that Accept and AcceptTCP have returned. If
// it does not rise while connections are queued, the server has stopped accepting.
//
// It does not count connections that another process or [Listener.TCPListener] has
// accepted from the same socket. It makes no system call and works after Close. It returns
// 0 for a zero Listener.
func (l *Listener) Accepted() uint64 {
	if !l.ok() {
		return 0
	}
	return l.accepted.Load()
}

// SetDeadline sets the deadline of Accept, as [net.TCPListener.SetDeadline] does.
func (l *Listener) SetDeadline(t time.Time) error {
	if !l.ok() {
		return l.socket().SetDeadline(t) // net's error
	}
	return l.intake.Gate.SetDeadline(l.intake.TCP, t)
}

// SetBacklog changes the backlog of the listening socket to n connections by calling
// listen(2) again. It returns the new account. [MaxBacklog] requests the maximum under the
// current ceiling.
//
// Queued connections are kept, even if the new limit is smaller than their number. In
// that case new clients get in only after the queue has emptied to the new limit.
// SetBacklog may be called concurrently with Accept. On FreeBSD this does not include the
// connections that an accept filter holds back: when the next client connects, the kernel
// resets those above the new limit.
//
// In these cases SetBacklog fails and does not change the limit:
//   - The listener was made with [WithStrictBacklog], and the kernel would grant less
//     than n. The error wraps a [*ClampError].
//   - The listener was made with [WithStrictBacklog], and the ceiling cannot be read. The
//     error matches [errors.ErrUnsupported].
//   - The listener was made with [WithFastOpen] on FreeBSD, and half the new limit would
//     be less than qlen. The error matches [errors.ErrUnsupported].
//   - Package net made the socket, for example on Windows, which has no second listen.
//     The error matches [errors.ErrUnsupported].
//   - l is closed. The error matches [net.ErrClosed].
//
// If the system reports a wrong ceiling, as gVisor can, a strict SetBacklog fails with a
// [*ClampError] after the kernel has stored a smaller limit than n. The returned account
// has that limit.
func (l *Listener) SetBacklog(n int) (Backlog, error) {
	if !l.ok() {
		return l.Backlog(), l.opError("listen", sys.ErrNotListening)
	}
	l.resize.Lock()
	defer l.resize.Unlock()
	account := l.account()
	var operr error
	err := l.intake.Raw.Control(func(fd uintptr) {
		account, operr = setBacklog(l.intake.Calls, int(fd), n, l.strict, l.fastOpen, account)
	})
	l.granted.Store(&account)
	current := account
	current.Ceiling = l.ceiling()
	if err := cmp.Or(err, operr); err != nil {
		return current, l.opError("listen", err)
	}
	return current, nil
}

// File returns a file with a duplicate of the descriptor, as [net.TCPListener.File]
// does. Use it to pass the socket, with the connections in its queue, to another
// process.
//
// Afterwards l counts as shared: when [Listener.Drain] ends, it lets new clients in again
// and returns [ErrStillOpen]. If an earlier drain keeps new clients out, File lets them
// in again.
//
// The Fd method of the file makes the socket blocking, and therefore l too. Package
// os/exec calls it for ExtraFiles. Use the SyscallConn method of the file instead.
func (l *Listener) File() (*os.File, error) {
	if l.ok() {
		if err := l.intake.MarkShared(); err != nil {
			return nil, l.opError("file", err)
		}
	}
	return l.socket().File()
}

// SyscallConn returns a raw connection to the listening socket, as
// [net.TCPListener.SyscallConn] does. Use it to read or set options.
//
// If a function passed to Control duplicates the descriptor, l counts as shared, as
// after [Listener.File]. To detect that on Linux, Control checks the descriptors that were
// opened meanwhile. A drain then checks all descriptors of the process when it ends.
// Neither detects that the function sends the descriptor to another process. To do that,
// send a copy that [Listener.File] returned.
//
// After Close the error matches [net.ErrClosed].
func (l *Listener) SyscallConn() (syscall.RawConn, error) {
	raw, err := l.socket().SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := l.intake.Raw.Control(func(uintptr) {}); err != nil {
		return nil, l.opError("raw-control", err) // l is closed
	}
	l.lend()
	return watchedConn{raw, l}, nil
}

// lend notes that other code gets access to the listening socket.
func (l *Listener) lend() {
	l.intake.Shown.Store(true)
	l.intake.Lent.Store(true)
}

// A watchedConn notices when a function duplicates the descriptor.
type watchedConn struct {
	syscall.RawConn
	l *Listener
}

func (c watchedConn) Control(f func(fd uintptr)) error {
	copied := false
	err := c.RawConn.Control(func(fd uintptr) { copied = intake.Duplicates(int(fd), func() { f(fd) }) })
	if copied {
		err = c.l.intake.MarkShared()
	}
	return err
}

// itself returns l. A type that embeds a *Listener has the method too, see ReadStats.
func (l *Listener) itself() *Listener { return l }

// addrString returns an address with its network.
func addrString(addr net.Addr) string { return addr.Network() + " " + addr.String() }

// opError returns err in the form that package net uses.
func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: l.Addr(), Err: sys.Cause(err)}
}

// EffectiveBacklog returns how long the accept queue may become, in connections. For how
// many connections wait now, see [Listener.Stats]. The result is one of the numbers of
// [Listener.Backlog]: the limit, or on FreeBSD one and a half times the limit, see listen(2).
// It is -1 if the limit is unknown. On most systems the queue holds one more, see
// [Backlog].Capacity.
//
// The kernel fixes the limit at listen(2). If the ceiling is raised later, the limit
// does not change until [Listener.SetBacklog] is called. On Linux and FreeBSD the limit
// is read from the socket: when l is made, and at each call of SetBacklog and
// [Listener.Backlog]. On other systems it is computed from the kernel's rule.
//
// EffectiveBacklog makes no system call and works after Close. If another Listener of the
// same socket has called SetBacklog, the result is correct after the next call of Backlog.
func (l *Listener) EffectiveBacklog() int {
	if !l.ok() {
		return unknown
	}
	return l.granted.Load().Effective
}

// Backlog returns the requested backlog, what the kernel granted and the current
// ceiling. At each call it reads the ceiling, and on Linux and FreeBSD the limit of the
// socket, which another Listener of the same socket can change. The ceiling is -1 if it
// cannot be read. After Close the limit is the last one that was read.
func (l *Listener) Backlog() Backlog {
	if !l.ok() {
		return noBacklog
	}
	l.resize.Lock()
	account := l.account()
	l.resize.Unlock()
	account.Ceiling = l.ceiling()
	return account
}

// account returns the account with the current limit of the socket, as far as the system
// reports it, and stores it for EffectiveBacklog. l.resize must be locked.
func (l *Listener) account() Backlog {
	l.intake.Raw.Control(func(fd uintptr) { // fails on a closed listener
		if limit, ok := readLimit(l.intake.Calls, int(fd)); ok {
			r := hostRule()
			account := r.account(l.granted.Load().Requested, unknown, limit, true)
			l.granted.Store(&account)
		}
	})
	return *l.granted.Load()
}

// ceiling reads the ceiling that applies to l. It returns -1 if that cannot be read. The
// network namespace of a closed socket is not known. For it, ceiling uses that of the
// calling thread.
func (l *Listener) ceiling() (ceiling int) {
	err := l.intake.Raw.Control(func(fd uintptr) { ceiling, _, _ = readBoundsOf(l.intake.Calls, int(fd)) })
	if err != nil {
		ceiling, _, _ = readBounds(l.intake.Calls)
	}
	return ceiling
}
