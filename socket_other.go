//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"syscall"
)

// system is a kernel on which net makes the socket: its rules are not known, or
// nothing of them can be asked for.
type system struct{}

var realSystem system

func (*system) bounds() (ceiling, floor int, err error) { return unknown, 0, errNoRule }

// listen has net listen. The backlog is a hint that net replaces by its own.
func (sys *system) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	unsupported := func(option string) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: notHere(option)}
	}
	if option := o.beyondNet(); option != "" {
		return unsupported(option)
	}

	// Whether net calls the hook is seen, not known: some of these have no socket
	// to show.
	called := len(o.controls) == 0
	lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		called = true
		return o.control(network, address, c)
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
	l, err := newListener(sys, ln.(*net.TCPListener), plainTCP, b)
	if err != nil {
		ln.Close()
		return nil, err
	}
	return l, nil
}

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

func (*system) listenShards(_ context.Context, network, _ string, _ *options, _ func(*Listener) bool) error {
	return &net.OpError{Op: "listen", Net: network, Err: notHere("more than one shard")}
}

func (*system) stats(int, transport, []byte) (Stats, error) {
	return noStats, fmt.Errorf("the accept queue of this system: %w", errors.ErrUnsupported)
}

func (*system) setBacklog(_, _ int, _ bool, _ int, former Backlog) (Backlog, error) {
	return former, fmt.Errorf("SetBacklog: %w", errors.ErrUnsupported)
}

func (*system) adopted(int) (transport, Backlog, error) {
	return transportUnknown, noBacklog, nil
}

func (*system) describe(*System) {}
