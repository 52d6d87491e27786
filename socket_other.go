//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
)

// The files named *_other.go are the smallest port. See kernel_unix.go for what a port
// provides.

// kernel stands for a system on which package net makes the socket. Its rules are not
// known, or it does not report the numbers.
type kernel struct{}

var realKernel kernel

func (*kernel) bounds() (ceiling, floor int, err error) { return unknown, 0, errNoRule }

// listen calls net.Listen, which ignores the backlog and uses its own.
func (k *kernel) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	unsupported := func(option string) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: notHere(option)}
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
	if o.keepAlive != nil {
		lc.KeepAliveConfig = *o.keepAlive
		if !o.keepAlive.Enable {
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

func (*kernel) listenShards(_ context.Context, network, _ string, _ *options, _ func(*Listener) bool) error {
	return &net.OpError{Op: "listen", Net: network, Err: notHere("ListenShards: more than one shard")}
}

func (*kernel) stats(int, transport, []byte) (Stats, error) {
	return noStats, fmt.Errorf("this system does not report the accept queue: %w", errors.ErrUnsupported)
}

func (*kernel) limit(int) (limit int, ok bool) { return unknown, false }

func (*kernel) setBacklog(_, _ int, _ bool, _ int, former Backlog) (Backlog, error) {
	return former, fmt.Errorf("this system cannot change the backlog: %w", errors.ErrUnsupported)
}

func (*kernel) inspect(int) (transport, Backlog, error) {
	return transportUnknown, noBacklog, nil
}

func (*kernel) readSettings(*System) {}
