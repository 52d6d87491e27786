package acceptq

import (
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// An Option sets one property of a new listener. A later option replaces an earlier
// one of its kind, except [WithControl]. No option is ignored: if the system cannot
// honour one, listening fails with an error that matches [errors.ErrUnsupported].
type Option func(*options)

// control is the hook of net.ListenConfig.
type control = func(network, address string, c syscall.RawConn) error

// options is what the Options of one call amount to.
type options struct {
	backlog   int
	strict    bool
	reusePort bool // by WithReusePort, or for shards of their own
	steers    bool // by WithReusePort: a drain may steer new clients to the others
	unsteered bool
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

// beyondNet names an option for which net has no room here; "" if there is none.
func (o *options) beyondNet() string {
	switch {
	case o.strict:
		return "WithStrictBacklog"
	case o.reusePort:
		return "WithReusePort"
	case o.deferAccept != 0:
		return "WithDeferAccept"
	case o.acceptFilter != nil:
		return "WithAcceptFilter"
	case o.fastOpen != 0:
		return "WithFastOpen"
	case o.receiveBuffer != 0:
		return "WithReceiveBuffer"
	case o.sendBuffer != 0:
		return "WithSendBuffer"
	}
	if o.keepAlive != nil {
		switch runtime.GOOS {
		case "plan9", "js", "wasip1":
			return "WithKeepAlive"
		}
	}
	return ""
}

// callControls calls the hooks in the order given, up to the first that fails.
func (o *options) callControls(network, address string, c syscall.RawConn) error {
	for _, f := range o.controls {
		if err := f(network, address, c); err != nil {
			return err
		}
	}
	return nil
}

// WithBacklog asks for an accept queue of n connections: n is passed to listen(2).
// Without this option, or if n is negative, the listener asks for the maximum that
// the system allows. Zero is passed on: Linux and FreeBSD then hold one connection,
// macOS treats it as the maximum, and OpenBSD raises it to 80.
//
// POSIX calls the number a hint: a kernel that grants less does not say so.
// [Listener.Backlog] tells what was granted, and [WithStrictBacklog] makes less an
// error. A number above 2147483647 is passed as 2147483647, because listen(2) takes 32
// bits; on macOS, NetBSD and DragonFly, which store 16, a number above 32767 is
// passed as 32767. On systems where net makes the socket (Windows and others, see the
// package comment), net chooses the number, and what was granted is unknown.
func WithBacklog(n int) Option {
	return func(o *options) { o.backlog = n }
}

// WithStrictBacklog makes listening fail, with a [*ClampError] in the
// [*net.OpError], if the kernel grants less than [WithBacklog] asks; nothing stays
// bound. If the ceiling can be read and is below n, listening fails before bind(2).
// It is not an error if more is granted, and a request for the maximum is never
// clamped. If what was granted cannot be known, listening fails with an error that
// matches [errors.ErrUnsupported].
func WithStrictBacklog() Option {
	return func(o *options) { o.strict = true }
}

// WithReusePort lets several sockets listen on one address, each with its own queue.
// The kernel spreads new connections over them: by SO_REUSEPORT on Linux (socket(7))
// and DragonFly, by SO_REUSEPORT_LB on FreeBSD (setsockopt(2)). Every socket of the
// address needs the option.
//
// The kernel chooses a socket by a hash of the addresses and ports, even if its queue
// is full. These may join the address:
//   - Linux: processes of the same user.
//   - FreeBSD before 15: processes of the same user; on a wildcard address with a port
//     that is not reserved, processes of every user.
//   - FreeBSD 15: processes of the same user.
//   - DragonFly: not known.
//
// On FreeBSD before 15 a socket belongs to the group from bind(2) on, and not from
// listen(2): clients that fall to it between the two are refused. Listen calls one right
// after the other.
//
// Listening fails with an error that matches [errors.ErrUnsupported] where the kernel
// gives all connections to one of the sockets:
//   - on macOS, NetBSD and OpenBSD
//   - on FreeBSD on the wildcard of both families (":8080" on "tcp") and, before 13.3,
//     in a jail
//   - on DragonFly on IPv6 and in a jail
//
// On Linux [Listener.Drain] steers new clients to the other listeners of the address by
// a BPF program on the group (SO_ATTACH_REUSEPORT_CBPF, socket(7)), and a listener that
// joins the group takes such a program off, since a process that was killed may have
// left it. The kernel does not show a program, so one that somebody else attached is
// taken off too: see [WithoutSteering].
func WithReusePort() Option {
	return func(o *options) { o.reusePort, o.steers = true, true }
}

// WithoutSteering leaves the BPF program of a SO_REUSEPORT group alone, for listeners
// whose group has a program of its own. Clients whose SYN falls to a listener that
// drains then wait for a second, as if it were alone. Every listener of the group needs
// the option. It does nothing without [WithReusePort] and on systems other than Linux.
func WithoutSteering() Option {
	return func(o *options) { o.unsteered = true }
}

// WithControl calls f on the socket after the listener's own options are set and
// before bind(2), as [net.ListenConfig] calls its Control: network is "tcp4" or
// "tcp6", and address is the resolved one. If the option is given several times, each
// f is called, in order. If f returns an error, listening fails with that error. The
// connection is valid only during the call. It is an error if f is nil, and on systems
// where net calls no such function (Plan 9, js, wasip1).
func WithControl(f func(network, address string, c syscall.RawConn) error) Option {
	return func(o *options) {
		if f == nil {
			o.fail("WithControl(nil)")
			return
		}
		o.controls = append(o.controls, f)
	}
}

// WithDeferAccept keeps a connection from Accept until its client has sent data. It
// is an error if d is not positive.
//
//   - Linux: TCP_DEFER_ACCEPT, tcp(7). d is rounded up to the next SYN-ACK
//     retransmission (1, 3, 7, 15, ... seconds). A client that is silent for longer is
//     forgotten, or let in if it answers that retransmission. The connection waits in
//     the SYN queue. If that queue is full, a client that got a SYN cookie is not
//     deferred. If d is longer than the kernel's longest wait, about 8 hours, the
//     error matches [errors.ErrUnsupported].
//   - FreeBSD, NetBSD and DragonFly: the accept filter "dataready", which sets no
//     time; see [WithAcceptFilter].
//   - Other systems: the error matches [errors.ErrUnsupported].
func WithDeferAccept(d time.Duration) Option {
	return positive("WithDeferAccept", d, func(o *options) *time.Duration { return &o.deferAccept })
}

// WithAcceptFilter makes the kernel hold connections back until the named filter lets
// them through: "dataready" waits for data, "httpready" for a whole GET or HEAD request.
// Data that cannot begin such a request passes "httpready" at once, a POST too. The
// meaning of arg depends on the filter; it is usually empty. A name has at most 15
// bytes, an argument 239.
//
// FreeBSD, NetBSD and DragonFly: SO_ACCEPTFILTER, accept_filter(9). Connections that are
// held back are Incomplete in [Stats] on FreeBSD; NetBSD and DragonFly do not tell them.
// Past the limit the oldest is reset (FreeBSD, DragonFly) or let through (NetBSD). If the
// filter's module is not loaded, the error matches ENOENT and names the module. On other
// systems, on FreeBSD 14, which takes filters and ignores them, and together with
// [WithDeferAccept], listening fails.
func WithAcceptFilter(name, arg string) Option {
	return func(o *options) {
		if name == "" || len(name) > 15 || len(arg) > 239 || strings.ContainsRune(name+arg, 0) {
			o.fail("WithAcceptFilter(%q, %q): a name of 1 to 15 bytes, an argument of 0 to 239, no NUL", name, arg)
			return
		}
		o.acceptFilter = &acceptFilter{name, arg}
	}
}

// WithFastOpen lets clients that have connected before send data in their SYN
// (TCP Fast Open, RFC 7413). At most qlen such connections may be in an unfinished
// handshake. It is an error if qlen is not positive.
//
//   - Linux: TCP_FASTOPEN, tcp(7). The kernel silently ignores the option if the bit
//     of value 2 in net.ipv4.tcp_fastopen is off, and silently cuts qlen to
//     net.core.somaxconn. Listening fails in both cases, in the first unless the
//     setting cannot be read.
//   - FreeBSD: TCP_FASTOPEN, tcp(4), with net.inet.tcp.fastopen.server_enable. The
//     kernel uses half the limit instead of qlen, and listening fails if that is less.
//     Before FreeBSD 15 each listen(2) on such a socket, and so each
//     [Listener.SetBacklog], leaks one counter in the kernel.
//   - Other systems: the error matches [errors.ErrUnsupported].
func WithFastOpen(qlen int) Option {
	return positive("WithFastOpen", qlen, func(o *options) *int { return &o.fastOpen })
}

// WithReceiveBuffer asks for a receive buffer of n bytes for each accepted
// connection: SO_RCVBUF, socket(7). It is set before listen(2), so that the window
// scale of the handshake fits it. The kernel then no longer tunes that buffer itself.
// It is an error if n is not positive or if the kernel grants less: Linux silently cuts
// n to net.core.rmem_max, FreeBSD grants a maximum of 8/9 of kern.ipc.maxsockbuf, and
// NetBSD one of 4/5 of kern.sbmax.
func WithReceiveBuffer(n int) Option {
	return positive("WithReceiveBuffer", n, func(o *options) *int { return &o.receiveBuffer })
}

// WithSendBuffer asks for a send buffer of n bytes for each accepted connection:
// SO_SNDBUF, socket(7), set before listen(2). The kernel then no longer tunes that
// buffer itself. It is an error if n is not positive or if the kernel grants less:
// Linux silently cuts n to net.core.wmem_max.
func WithSendBuffer(n int) Option {
	return positive("WithSendBuffer", n, func(o *options) *int { return &o.sendBuffer })
}

// WithKeepAlive sets keep-alive on each accepted connection. The fields mean what they
// mean in [net.ListenConfig]: zero is net's default, and negative leaves the system's
// value. If Enable is false, connections have no keep-alive; net turns it on for a zero
// KeepAliveConfig. Without this option the default is an idle time of 15 s, an interval
// of 15 s and 9 probes. The listening socket has no keep-alive, because NetBSD and macOS
// end a listening socket that has it.
//
// Listening fails if the kernel refuses a value. For that the values are tried on
// another socket, which is closed again. On systems where net makes the socket, net
// ignores a refusal. The error matches [errors.ErrUnsupported] on OpenBSD, where no
// value can be set, unless all three are negative. It does so for a negative value on a
// system that does not tell its own, or whose own is less than a second.
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
