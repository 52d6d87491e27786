package acceptq

import (
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"syscall"
	"time"
)

// An Option sets one thing about a listener that is about to be made. A later
// one replaces an earlier one of its kind, but for [WithControl]. An option
// that the system cannot honour makes listening fail with an error that matches
// [errors.ErrUnsupported]; none is ignored.
type Option func(*options)

// control is the hook of net.ListenConfig.
type control = func(network, address string, c syscall.RawConn) error

// options is what the Options of one call amount to.
type options struct {
	backlog   int
	strict    bool
	reusePort bool
	controls  []control

	// Zero and nil are for what was not asked for.
	deferAccept   time.Duration
	acceptFilter  *acceptFilter
	fastOpen      int
	receiveBuffer int
	sendBuffer    int
	keepAlive     *net.KeepAliveConfig

	err error
}

type acceptFilter struct{ name, arg string }

func newOptions(opts []Option) (*options, error) {
	o := &options{backlog: -1}
	for _, opt := range opts {
		if opt == nil {
			return nil, errors.New("acceptq: nil Option")
		}
		opt(o)
	}
	if o.err == nil && o.deferAccept != 0 && o.acceptFilter != nil {
		return nil, errors.New("acceptq: WithDeferAccept and WithAcceptFilter: a socket has one filter")
	}
	return o, o.err
}

// fail notes the first option that makes no sense.
func (o *options) fail(format string, args ...any) {
	if o.err == nil {
		o.err = fmt.Errorf("acceptq: "+format, args...)
	}
}

// positive sets an option that counts something, of which there is at least one.
func positive[T int | time.Duration](option string, n T, field func(*options) *T) Option {
	return func(o *options) {
		if n <= 0 {
			o.fail("%s(%v): not positive", option, n)
			return
		}
		*field(o) = n
	}
}

// notHere is the error of an option that this system cannot honour.
func notHere(option string) error { return fmt.Errorf("%s: %w", option, errors.ErrUnsupported) }

// control calls the hooks in the order given, up to the first that fails.
func (o *options) control(network, address string, c syscall.RawConn) error {
	for _, f := range o.controls {
		if err := f(network, address, c); err != nil {
			return err
		}
	}
	return nil
}

// WithBacklog asks for an accept queue of n connections: the number passed to
// listen(2). Without it, and with a negative n, the listener asks for as much
// as the system allows. Zero is passed on: Linux and FreeBSD then hold one
// connection, macOS takes it for the maximum, OpenBSD for 80.
//
// POSIX calls the number a hint. A kernel that grants less says nothing; the
// listener does: see [Listener.Backlog], and [WithStrictBacklog], which makes
// it an error. A number above 2147483647 is passed as that, since listen(2)
// takes 32 bits; macOS, NetBSD and DragonFly keep 16, so there it is 32767.
// Where the package does not make the socket itself (Windows and others, see
// the package comment) net decides, and what was granted is unknown.
func WithBacklog(n int) Option {
	return func(o *options) { o.backlog = n }
}

// WithStrictBacklog makes listening fail, with a [*ClampError] in the
// [*net.OpError], when the kernel grants less than [WithBacklog] asks; nothing
// stays bound. Where the ceiling can be read, one below n is refused before bind(2).
// Being granted more is no error, and as much as allowed is never too little. Where what was granted cannot be known, listening fails with an
// error that matches [errors.ErrUnsupported].
func WithStrictBacklog() Option {
	return func(o *options) { o.strict = true }
}

// WithReusePort lets several sockets listen on one address, each with a queue
// of its own, and the kernel spread new connections over them: SO_REUSEPORT on
// Linux (socket(7)) and DragonFly, SO_REUSEPORT_LB on FreeBSD (setsockopt(2)).
// Every socket of the address needs it.
//
// The kernel picks by a hash of the addresses and ports and does not look
// whether the queue is full. Who else may join the address:
//
//   - Linux: processes of the same user.
//   - FreeBSD before 15: of the same user; on a wildcard address with a port that is
//     not reserved, of every user.
//   - FreeBSD 15: of the same user.
//   - DragonFly: not known.
//
// On FreeBSD before 15 a socket belongs to the group from bind(2) on, and not from
// listen(2): the clients that fall to it between the two are refused. Listen calls
// one right after the other.
//
// Listening fails with an error that matches [errors.ErrUnsupported] where the kernel
// gives all connections to one of the sockets: on macOS, NetBSD and OpenBSD; on
// FreeBSD on the wildcard of both families (":8080" on "tcp") and, before 13.3, in a
// jail; on DragonFly on IPv6 and in a jail.
func WithReusePort() Option {
	return func(o *options) { o.reusePort = true }
}

// WithControl has f called on the socket after the listener's own options are
// set and before bind(2), as [net.ListenConfig] calls its Control: network is
// "tcp4" or "tcp6", and address the one resolved. Given twice, both are called,
// in order. An error of f makes listening fail with it. The connection is valid
// during the call only. It is an error if f is nil, and where the system has no
// such moment (Plan 9, js, wasip1).
func WithControl(f func(network, address string, c syscall.RawConn) error) Option {
	return func(o *options) {
		if f == nil {
			o.fail("WithControl(nil)")
			return
		}
		o.controls = append(o.controls, f)
	}
}

// WithDeferAccept keeps a connection from Accept until its client has sent
// something. It is an error if d is not positive.
//
// Linux: TCP_DEFER_ACCEPT, tcp(7). The wait is d, made longer to the next step at
// which the kernel repeats its SYN-ACK (1, 3, 7, 15, ... seconds); a client that is
// silent for longer is forgotten, or let in if it answers then. It waits in the
// SYN queue, and past the limit of that a client with a SYN cookie is not
// deferred. What is longer than the kernel's longest wait, some 8 hours, is an
// error that matches [errors.ErrUnsupported]. FreeBSD, NetBSD and DragonFly: the accept filter "dataready", which
// sets no time; see [WithAcceptFilter]. Elsewhere listening fails with an error
// that matches [errors.ErrUnsupported].
func WithDeferAccept(d time.Duration) Option {
	return positive("WithDeferAccept", d, func(o *options) *time.Duration { return &o.deferAccept })
}

// WithAcceptFilter has the kernel hold connections back until the filter of that
// name lets them through: "dataready" until there is data, "httpready" until there
// is a whole GET or HEAD request. Data that cannot begin one of these passes
// "httpready" at once, a POST too. The argument is the filter's own and usually
// empty.
//
// FreeBSD, NetBSD and DragonFly: SO_ACCEPTFILTER, accept_filter(9). Connections that
// wait are Incomplete in [Stats] on FreeBSD; NetBSD and DragonFly do not tell them.
// Past the limit the oldest is reset (FreeBSD, DragonFly) or let through (NetBSD). A
// filter whose module is not loaded gives ENOENT and an error that names the module.
// FreeBSD 14 takes filters and ignores them: there, elsewhere, and together with
// [WithDeferAccept], listening fails. A name holds 15 bytes, an argument 239.
func WithAcceptFilter(name, arg string) Option {
	return func(o *options) {
		if name == "" || len(name) > 15 || len(arg) > 239 || strings.ContainsRune(name+arg, 0) {
			o.fail("WithAcceptFilter(%q, %q): a name of 1 to 15 bytes, an argument of 0 to 239, no NUL", name, arg)
			return
		}
		o.acceptFilter = &acceptFilter{name, arg}
	}
}

// WithFastOpen lets clients that have been here before send data in their SYN
// (RFC 7413), for at most qlen connections whose handshake is not finished. It is
// an error if qlen is not positive.
//
// Linux: TCP_FASTOPEN, tcp(7). The kernel takes the option and does nothing when
// bit 2 of net.ipv4.tcp_fastopen is off, and cuts qlen to net.core.somaxconn: both
// make listening fail, the first unless the setting cannot be read. FreeBSD:
// TCP_FASTOPEN, tcp(4), with net.inet.tcp.fastopen.server_enable; the kernel keeps
// its own count, half the limit, and listening fails if that is less than qlen.
// On FreeBSD before 15 each listen(2) on such a socket, and so each
// [Listener.SetBacklog], leaks one counter in the kernel.
// Elsewhere the error matches [errors.ErrUnsupported].
func WithFastOpen(qlen int) Option {
	return positive("WithFastOpen", qlen, func(o *options) *int { return &o.fastOpen })
}

// WithReceiveBuffer asks for a receive buffer of n bytes for each accepted
// connection: SO_RCVBUF, socket(7), set before listen(2), so that the window scale
// of the handshake fits it. It ends the kernel's own tuning of that buffer. It is
// an error if n is not positive, and if the kernel grants less: Linux cuts it to
// net.core.rmem_max and says nothing; FreeBSD grants 8/9 of kern.ipc.maxsockbuf and
// NetBSD 4/5 of kern.sbmax.
func WithReceiveBuffer(n int) Option {
	return positive("WithReceiveBuffer", n, func(o *options) *int { return &o.receiveBuffer })
}

// WithSendBuffer asks for a send buffer of n bytes for each accepted connection:
// SO_SNDBUF, socket(7), set before listen(2). It ends the kernel's own tuning of
// that buffer. It is an error if n is not positive, and if the kernel grants less:
// Linux cuts it to net.core.wmem_max and says nothing.
func WithSendBuffer(n int) Option {
	return positive("WithSendBuffer", n, func(o *options) *int { return &o.sendBuffer })
}

// WithKeepAlive sets keep-alive on each accepted connection. The fields mean what
// they do in [net.ListenConfig]: zero is net's default, negative leaves the
// system's, and with Enable false connections have none, which for the zero
// KeepAliveConfig differs from net's. Without the option it is on, after 15 s, each
// 15 s, 9 times. The listening socket has none: NetBSD and macOS would end it.
// Values that the kernel refuses make listening fail where the package makes the
// socket; elsewhere net ignores them. OpenBSD has no times to set: there all three
// are negative, or the error matches [errors.ErrUnsupported], as it does for a
// negative one on a system that does not tell its own, or whose own is less than a
// second.
func WithKeepAlive(config net.KeepAliveConfig) Option {
	return func(o *options) {
		// The kernel takes 32 bits of each, and net does not look.
		if max(config.Idle, config.Interval) > math.MaxInt32*time.Second || int64(config.Count) > math.MaxInt32 {
			o.fail("WithKeepAlive(%+v): more than fits", config)
			return
		}
		o.keepAlive = &config
	}
}
