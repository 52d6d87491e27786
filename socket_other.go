//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
)

func readBounds(*sys.Calls) (ceiling, floor int, err error) { return unknown, 0, errNoRule }

func readBoundsOf(*sys.Calls, int) (ceiling, floor int, err error) { return unknown, 0, errNoRule }

// makeListener calls net.Listen, which ignores the backlog and uses its own.
func makeListener(k *sys.Calls, ctx context.Context, network, address string, o *options) (*Listener, error) {
	unsupported := func(option string) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: sockopt.Unsupported(option)}
	}
	if option := o.beyondNet(); option != "" {
		return unsupported(option)
	}

	// On some of these systems package net does not call Control, because it has no
	// socket to pass.
	called := len(o.controls) == 0
	lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		called = true
		return o.callControls(network, address, c)
	}}
	if o.KeepAlive != nil {
		lc.KeepAliveConfig = *o.KeepAlive
		if !o.KeepAlive.Enable {
			lc.KeepAlive = -1
		}
	}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if !called {
		ln.Close()
		return unsupported("WithControl")
	}
	if err := ctx.Err(); err != nil {
		ln.Close()
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ln.Addr(), Err: err}
	}
	b := rule{}.account(o.backlog, unknown, unknown, false)
	l, err := newListener(k, ln.(*net.TCPListener), plainTCP, b)
	if err != nil {
		ln.Close()
		return nil, err
	}
	return l, nil
}

func makeShards(_ *sys.Calls, _ context.Context, network, _ string, _ *options, _ func(*Listener) bool) error {
	return &net.OpError{Op: "listen", Net: network, Err: sockopt.Unsupported("ListenShards: more than one shard")}
}

func readStatsOf(*sys.Calls, int, transport, []byte) (Stats, error) {
	return noStats, fmt.Errorf("this system does not report the accept queue: %w", errors.ErrUnsupported)
}

func readLimit(*sys.Calls, int) (limit int, ok bool) { return unknown, false }

func setBacklog(_ *sys.Calls, _, _ int, _ bool, _ int, former Backlog) (Backlog, error) {
	return former, fmt.Errorf("this system cannot change the backlog: %w", errors.ErrUnsupported)
}

func inspect(*sys.Calls, int) (transport, Backlog, error) {
	return transportUnknown, noBacklog, nil
}

func readSettings(*sys.Calls, *System) error { return nil }
