package acceptq

import (
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sockopt"
)

// An Option sets one property of a new listener. If an option is given twice, the later
// one applies, except for [WithControl]. If the system does not support an option,
// listening fails with an error that matches [errors.ErrUnsupported]. A nil Option is
// ignored.
type Option func(*options)

// control is the hook of net.ListenConfig.
type control = func(network, address string, c syscall.RawConn) error

// options holds the settings that the Options of one call make.
type options struct {
	sockopt.Options
	backlog   int
	strict    bool
	steers    bool // set by WithReusePort: a drain may steer new clients to other listeners
	unsteered bool
	controls  []control

	err error
}

func newOptions(opts []Option) (*options, error) {
	o := &options{backlog: MaxBacklog}
	for _, opt := range opts {
		if opt != nil {
			opt(o)
		}
	}
	if o.err == nil && o.DeferAccept != 0 && o.AcceptFilter != nil {
		return nil, errors.New("WithDeferAccept and WithAcceptFilter: a socket has only one filter; use one of the two")
	}
	return o, o.err
}

// fail records the error of the first invalid option.
func (o *options) fail(format string, args ...any) {
	if o.err == nil {
		o.err = fmt.Errorf(format, args...)
	}
}

// positive returns an Option that sets a number or a time. The value must be positive.
func positive[T int | time.Duration](option string, n T, field func(*options) *T) Option {
	return func(o *options) {
		if n <= 0 {
			o.fail("%s(%v): not positive", option, n)
			return
		}
		*field(o) = n
	}
}

// beyondNet returns the name of an option that package net cannot apply on this system.
// It returns "" if there is none.
func (o *options) beyondNet() string {
	if o.strict {
		return "WithStrictBacklog"
	}
	return o.Options.BeyondNet()
}

// callControls calls the functions of WithControl in order and stops at the first error.
func (o *options) callControls(network, address string, c syscall.RawConn) error {
	for _, f := range o.controls {
		if err := f(network, address, c); err != nil {
			return err
		}
	}
	return nil
}

// WithBacklog requests an accept queue of n connections: it passes n to listen(2).
// [MaxBacklog] requests the maximum that the system allows. It is the default.
//
// The kernel may grant less without an error, because POSIX calls the number a hint.
// [Listener.Backlog] reports what the kernel granted. [WithStrictBacklog] makes listening
// fail if that is less than n. Some values are special:
//   - 0: the queue holds one connection on Linux and FreeBSD. macOS treats 0 as the
//     maximum, and OpenBSD raises it to 80.
//   - Values that the kernel cannot store are capped. The maximum is 32767 on macOS,
//     NetBSD and DragonFly, which store 16 bits, and 2147483647 on other systems.
//
// On systems where package net makes the socket (Windows and others, see the package
// comment), package net chooses the number, and the limit is unknown.
func WithBacklog(n int) Option {
	return func(o *options) { o.backlog = n }
}

// WithStrictBacklog makes listening fail if the kernel grants less than [WithBacklog]
// requests. The error wraps a [*ClampError], and no socket stays open.
//
// If the ceiling can be read and is below n, listening fails before bind(2). It is not
// an error if the kernel grants more than n. A request for the maximum is never clamped.
// If the limit is unknown, listening fails with an error that matches
// [errors.ErrUnsupported].
func WithStrictBacklog() Option {
	return func(o *options) { o.strict = true }
}

// WithReusePort lets several sockets listen on one address, each with its own queue.
// Every socket on the address needs the option. The kernel spreads new connections over
// the sockets by a hash of the addresses and ports, even if a queue is full.
//   - Linux: SO_REUSEPORT, socket(7). Processes of the same user can join the address.
//     While a socket drains, new clients go to the others, see [Listener.Drain].
//   - FreeBSD: SO_REUSEPORT_LB, setsockopt(2). Processes of the same user can join.
//     Before FreeBSD 15 every user can join a wildcard address whose port is not
//     reserved. The kernel assigns connections to a maximum of 256 sockets on one
//     address.
//   - DragonFly: SO_REUSEPORT. Processes of the same user can join. The kernel assigns
//     connections to a maximum of 128 sockets on one address.
//
// Listening fails with an error that matches [errors.ErrUnsupported] if the kernel does
// not spread connections:
//   - macOS, NetBSD, OpenBSD: always.
//   - FreeBSD: for the wildcard of both families (":8080" on "tcp") and, before 13.3, in
//     a jail.
//   - DragonFly: for IPv6 and, before 5.9, in a jail.
//   - FreeBSD and DragonFly: if this process already has the maximum of sockets on the
//     address. The sockets of other processes cannot be counted: above the maximum the
//     socket listens but gets no client. On FreeBSD that does not change when others
//     close. If processes overlap, use at most half the maximum in each.
//
// The section "Listeners on one address" of the package comment has more.
func WithReusePort() Option {
	return func(o *options) { o.ReusePort, o.steers = true, true }
}

// WithoutSteering keeps this package from changing the BPF program of a SO_REUSEPORT
// group, and from asking the kernel which listeners of the group answer. Use it if your
// code attaches such a program. Every listener of the group needs the option.
//
// During a drain the kernel then still assigns clients to the draining listener and drops
// their SYNs. These clients retry after a second. The option has no effect without
// [WithReusePort] and on systems other than Linux.
func WithoutSteering() Option {
	return func(o *options) { o.unsteered = true }
}

// WithControl calls f on the socket before bind(2), after the other options are set. f
// is like the Control field of [net.ListenConfig]: network is "tcp4" or "tcp6", address
// is the resolved address, and c is valid only during the call. If f sets SO_REUSEPORT
// (SO_REUSEPORT_LB on FreeBSD), the listener steers as with [WithReusePort].
//
// If the option is given several times, each f is called, in order. If f returns an
// error, listening fails with that error. It is an error if f is nil. On Plan 9, js and
// wasip1, where package net calls no such function, the error matches
// [errors.ErrUnsupported].
func WithControl(f func(network, address string, c syscall.RawConn) error) Option {
	return func(o *options) {
		if f == nil {
			o.fail("WithControl(nil): nil function")
			return
		}
		o.controls = append(o.controls, f)
	}
}

// WithDeferAccept makes Accept return a connection only after its client has sent data.
// It is an error if d is not positive.
//
//   - Linux: TCP_DEFER_ACCEPT, tcp(7). The connection waits in the SYN queue. d is
//     rounded up to the next SYN-ACK retransmission (1, 3, 7, 15, ... seconds). The
//     kernel then sends the SYN-ACK again. A client that answers it, as Linux does, gets
//     in without data. Other connections are dropped. If the SYN queue is full,
//     connections made with a SYN cookie are not deferred. Drops in [Stats] rises by one
//     for each client, which harms nobody. If d is longer than the maximum of the
//     kernel, about 8 hours, the error matches [errors.ErrUnsupported].
//   - FreeBSD, NetBSD and DragonFly: the accept filter "dataready", which ignores d, see
//     [WithAcceptFilter].
//   - Other systems: the error matches [errors.ErrUnsupported].
func WithDeferAccept(d time.Duration) Option {
	return positive("WithDeferAccept", d, func(o *options) *time.Duration { return &o.DeferAccept })
}

// WithAcceptFilter makes the kernel hold connections back until the named filter lets
// them through: SO_ACCEPTFILTER, accept_filter(9). The filter "dataready" waits for data.
// The filter "httpready" waits for a complete GET or HEAD request, and lets all other
// data through at once, such as a POST request. The meaning of arg depends on the filter,
// and arg is usually empty. A name has at most 15 bytes and an argument at most 239.
//
// If more connections than the limit are held back, the kernel resets the oldest (FreeBSD,
// DragonFly) or lets it through (NetBSD). On FreeBSD, Incomplete in [Stats] is the number of
// connections that are held back. NetBSD and DragonFly do not report it.
//
// If the module of the filter is not loaded, the error matches ENOENT and names the
// module. The option cannot be combined with [WithDeferAccept]. On systems without
// accept filters, and on FreeBSD 14, which ignores them, the error matches
// [errors.ErrUnsupported].
func WithAcceptFilter(name, arg string) Option {
	return func(o *options) {
		if name == "" || len(name) > 15 || len(arg) > 239 || strings.ContainsRune(name+arg, 0) {
			o.fail("WithAcceptFilter(%q, %q): the name must have 1 to 15 bytes and the argument at most 239, without NUL", name, arg)
			return
		}
		o.AcceptFilter = &sockopt.AcceptFilter{Name: name, Arg: arg}
	}
}

// WithFastOpen enables TCP Fast Open (RFC 7413): clients that have connected before may
// send data in their SYN. At most qlen such connections may have an unfinished
// handshake. It is an error if qlen is not positive. If the kernel does not grant the
// option or qlen, the error matches [errors.ErrUnsupported].
//
//   - Linux: TCP_FASTOPEN, tcp(7). Listening fails if the bit 0x2 of
//     net.ipv4.tcp_fastopen is off, which makes the kernel ignore the option, or if qlen
//     is above net.core.somaxconn, to which the kernel clamps it. The bit is not checked
//     if the setting cannot be read.
//   - FreeBSD: TCP_FASTOPEN, tcp(4), with net.inet.tcp.fastopen.server_enable. The
//     kernel uses half the limit instead of qlen. Listening fails if that is less than
//     qlen. Before FreeBSD 15 the kernel leaks one counter at each listen(2) on the
//     socket, and therefore at each [Listener.SetBacklog].
//   - Other systems: not supported.
func WithFastOpen(qlen int) Option {
	return positive("WithFastOpen", qlen, func(o *options) *int { return &o.FastOpen })
}

// WithReceiveBuffer requests a receive buffer of n bytes for each accepted connection:
// SO_RCVBUF, socket(7). It is set before listen(2), so that the window scale of the
// handshake matches. The kernel then no longer tunes the size of this buffer.
//
// It is an error if n is not positive or if the kernel grants less:
//   - Linux silently clamps n to net.core.rmem_max.
//   - FreeBSD grants at most 8/9 of kern.ipc.maxsockbuf.
//   - NetBSD grants at most 4/5 of kern.sbmax.
//   - DragonFly silently clamps n to 4/5 of kern.ipc.maxsockbuf.
//   - On FreeBSD, NetBSD and DragonFly RLIMIT_SBSIZE of setrlimit(2) is a further maximum.
func WithReceiveBuffer(n int) Option {
	return positive("WithReceiveBuffer", n, func(o *options) *int { return &o.ReceiveBuffer })
}

// WithSendBuffer requests a send buffer of n bytes for each accepted connection:
// SO_SNDBUF, socket(7). It is set before listen(2). The kernel then no longer tunes the
// size of this buffer.
//
// It is an error if n is not positive or if the kernel grants less. Linux silently
// clamps n to net.core.wmem_max. The maximum on FreeBSD, NetBSD and DragonFly is that of
// [WithReceiveBuffer].
func WithSendBuffer(n int) Option {
	return positive("WithSendBuffer", n, func(o *options) *int { return &o.SendBuffer })
}

// WithKeepAlive sets TCP keep-alive on each accepted connection. Without this option the
// default is an idle time of 15 s, an interval of 15 s and 9 probes. A field of 0 uses
// that default, and a negative field keeps the value of the system. If Enable is false,
// keep-alive is off, even for a zero KeepAliveConfig, for which package net enables it.
//
// The listening socket has no keep-alive, because NetBSD and macOS end a listening socket
// that has it.
//
// Listening fails if the kernel rejects a value, which is tested on a temporary socket. On
// systems where package net makes the socket, package net ignores a rejected value. The
// error matches [errors.ErrUnsupported] in these cases:
//   - OpenBSD, which cannot set the values, unless all three are negative.
//   - A negative field, if the system does not report its own value or if that value is
//     less than a second.
func WithKeepAlive(config net.KeepAliveConfig) Option {
	return func(o *options) {
		// The kernel uses 32 bits of each value, and package net does not check that.
		if max(config.Idle, config.Interval) > math.MaxInt32*time.Second || int64(config.Count) > math.MaxInt32 {
			o.fail("WithKeepAlive(%+v): the maximum is %d s and %d probes", config, math.MaxInt32, math.MaxInt32)
			return
		}
		o.KeepAlive = &config
	}
}
