//go:build !linux

package acceptq

import (
	"context"
	"slices"
)

// A steering directs new clients to other listeners of the address. These systems have no
// way to do that.
type steering struct{}

type membership struct{}

func steeringOf([]*Listener) *steering { return nil }

func (*membership) note(context.Context, *Listener) {}

func (*steering) look(context.Context, *flight, bool) {}
func (*steering) leave(*Listener)                     {}
func (*steering) close(l *Listener) error             { return l.tcp.Close() }

// closingOrder returns the listeners in the order in which they are to close: the last
// one first.
func closingOrder(listeners []*Listener) []*Listener {
	order := slices.Clone(listeners)
	slices.Reverse(order)
	return order
}
