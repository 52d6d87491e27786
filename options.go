package acceptq

import (
	"errors"
	"syscall"
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
	err       error
}

func newOptions(opts []Option) (*options, error) {
	o := &options{backlog: -1}
	for _, opt := range opts {
		if opt == nil {
			return nil, errors.New("acceptq: nil Option")
		}
		opt(o)
	}
	return o, o.err
}

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
// stays bound. Being granted more is no error, and as much as allowed is never
// too little. Where what was granted cannot be known, listening fails with an
// error that matches [errors.ErrUnsupported].
func WithStrictBacklog() Option {
	return func(o *options) { o.strict = true }
}

// WithReusePort lets several sockets listen on one address, each with a queue
// of its own, and the kernel spread new connections over them: SO_REUSEPORT on
// Linux (socket(7)) and DragonFly, SO_REUSEPORT_LB on FreeBSD (setsockopt(2)).
// Every socket of the address needs it, and on Linux one user must own them all.
//
// The kernel picks by a hash of the addresses and ports and does not look
// whether the queue is full. On systems whose SO_REUSEPORT does not spread
// (macOS, NetBSD, OpenBSD), and where there is none, listening fails with an
// error that matches [errors.ErrUnsupported].
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
			o.err = errors.New("acceptq: WithControl of a nil function")
			return
		}
		o.controls = append(o.controls, f)
	}
}
