//go:build !linux

package acceptq

import (
	"context"
	"slices"
)

// A steering directs new clients to other listeners of the address. These systems have no
// way to do that.
type steering struct{}

func steeringOf([]*Listener) *steering        { return nil }
func noteGroup(context.Context, ...*Listener) {}
func (*Listener) expectMigration()            {}

func (*steering) look(context.Context, *flight, bool) {}
func (*steering) leave(*Listener)                     {}
func (*steering) close(l *Listener) error             { return l.tcp.Close() }
func (*kernel) detachProgram(int) error               { return nil }

// closingOrder returns the listeners in the order in which they are to close: the last
// one first.
func closingOrder(listeners []*Listener) []*Listener {
	order := slices.Clone(listeners)
	slices.Reverse(order)
	return order
}
