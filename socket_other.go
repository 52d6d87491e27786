//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
)

// system is a kernel on which net makes the socket: its rules are not known, or
// nothing of them can be asked for.
type system struct{}

var realSystem system

func (*system) bounds() (ceiling, floor int, err error) { return unknown, 0, errNoRule }

// listen has net listen. The backlog is a hint that net replaces by its own.
func (sys *system) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	fail := func(what string) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: fmt.Errorf("%s: %w", what, errors.ErrUnsupported)}
	}
	switch {
	case o.strict:
		return fail("WithStrictBacklog")
	case o.reusePort:
		return fail("WithReusePort")
	}

	// Whether net calls the hook is seen, not known: some of these have no socket
	// to show.
	called := len(o.controls) == 0
	lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		called = true
		return o.control(network, address, c)
	}}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if !called {
		ln.Close()
		return fail("WithControl")
	}
	if err := ctx.Err(); err != nil {
		ln.Close()
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ln.Addr(), Err: err}
	}
	b := rule{}.account(o.backlog, unknown, unknown, false)
	return newListener(sys, ln.(*net.TCPListener), plainTCP, b, false)
}

func (*system) stats(int, transport, []byte) (Stats, error) {
	return noStats, fmt.Errorf("the accept queue of this system: %w", errors.ErrUnsupported)
}

func (*system) setBacklog(_, _ int, _ bool, former Backlog) (Backlog, error) {
	return former, fmt.Errorf("SetBacklog: %w", errors.ErrUnsupported)
}

func (*system) adopted(int) (transport, Backlog, error) {
	return transportUnknown, rule{}.account(-1, unknown, unknown, false), nil
}

func (*system) describe(*System) {}
