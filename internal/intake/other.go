//go:build !linux

package intake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// A Steering directs new clients to other listeners of the address. These systems have no
// way to do that.
type Steering struct{}

func steeringOf(context.Context, []*Draining) *Steering { return nil }

func (*Steering) begin(_ context.Context, stop func()) { stop() }
func (*Steering) look(context.Context)                 {}

// Welcome does nothing: no group needs a program.
func Welcome(context.Context, []*Intake) {}
func leaveSteering([]*Intake)            {}
func forgetSteering(*Intake)             {}

// A place is that of a Listener in a steering.
type place struct{}

// CloseListener closes l.
func (*place) CloseListener(l *Intake) error { return l.TCP.Close() }

// A Stop keeps new clients out. These systems have none, because no setting drops SYNs
// and lets in-flight handshakes finish. IP_MINTTL drops the final ACK too (FreeBSD).
// After listen(fd, 0) new clients still get in.
type Stop struct{}

func stopFor(*sys.Calls, int, *Intake, bool) (*Stop, error) {
	return nil, fmt.Errorf("this system cannot keep them out: %w", errors.ErrUnsupported)
}

// Lift does nothing, because nothing is ever set.
func Lift(*sys.Calls, int, *Stop) (*Stop, error) { return nil, nil }
func stands(*sys.Calls, int) bool                { return true }
func removeInherited(*sys.Calls, int)            {}
func removeMigrated(*sys.Calls, *net.TCPConn)    {}

// MayReusePort returns false: no connection moves to another listener.
func MayReusePort(*sys.Calls, int) bool { return false }

func duplicated([]*Intake) map[*Intake]bool { return nil }

// Duplicates calls f. Whether f duplicates a descriptor is not known here.
func Duplicates(_ int, f func()) bool { f(); return false }

// A flight limits the time that a drain waits for connections that the kernel holds back.
// These systems do not list in-flight handshakes.
type flight struct{ until time.Time }

// NewFlight returns a flight for listeners that share one port.
func NewFlight(context.Context, []*Draining) *flight {
	return &flight{until: time.Now().Add(DrainFlight)}
}

func (*flight) look(context.Context) {}
func (*flight) left() int            { return sys.Unknown }
func (*flight) mayUseCookies() bool  { return false }
func (*flight) close()               {}

func (f *flight) extend() { f.until = time.Now().Add(DrainFlight) }

// over reports whether the time is over.
func (f *flight) over() bool { return time.Now().After(f.until) }
