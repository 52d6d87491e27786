//go:build !linux

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A stop keeps new clients out. The systems here have none: nothing lets the
// handshakes in flight finish while it drops SYNs. IP_MINTTL drops the final ACK too
// (FreeBSD), and listen(fd, 0) keeps nobody out on any of them.
type stop struct{}

func (*kernel) stopIntake(int, *intake, *flight) (*stop, error) {
	return nil, fmt.Errorf("on this system: %w", errors.ErrUnsupported)
}

func (*kernel) lift(int, *stop) error      { return nil }
func (*kernel) removeInherited(int, *stop) {}

func (*kernel) liftLeft(int) (*inheritance, error) { return nil, nil }

func (*Listener) duplicated() bool { return false }

// A flight is the time that connections which the kernel holds back are given. The
// handshakes in flight cannot be told from those that begin later.
type flight struct{ until time.Time }

func newFlight(*Listener) *flight { return &flight{until: time.Now().Add(drainFlight)} }

func (*flight) look(context.Context) {}
func (*flight) left() int            { return unknown }
func (*flight) close()               {}

// over reports whether they have been waited for long enough.
func (f *flight) over() bool { return time.Now().After(f.until) }
