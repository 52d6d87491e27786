//go:build !linux

package acceptq

import (
	"context"
	"slices"
)

// A steering leads new clients to other listeners of the address. The systems here have
// no way to do that.
type steering struct{}

func newSteering([]*Listener, *flight) *steering { return nil }
func noteGroup(context.Context, ...*Listener)    {}

func (*steering) look(context.Context, bool) {}
func (*steering) off()                       {}
func (*steering) close(l *Listener) error    { return l.tcp.Close() }
func (*kernel) detachProgram(int) error      { return nil }

// closingOrder is the same everywhere, the last one first.
func closingOrder(listeners []*Listener) []*Listener {
	order := slices.Clone(listeners)
	slices.Reverse(order)
	return order
}
