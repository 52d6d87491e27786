//go:build !linux

package acceptq

import "context"

// A steering directs new clients to other listeners of the address. These systems have no
// way to do that.
type steering struct{}

func steeringOf(context.Context, []*draining) *steering { return nil }

func (*steering) begin(_ context.Context, stop func()) { stop() }
func (*steering) look(context.Context)                 {}

func welcome(context.Context, []*Listener) {}
func leaveSteering([]*Listener)            {}
func forgetSteering(*Listener)             {}

// A place is that of a Listener in a steering.
type place struct{}

func (*place) closeListener(l *Listener) error { return l.tcp.Close() }
