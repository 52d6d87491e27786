//go:build !linux

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// A stop keeps new clients out. These systems have none, because no setting drops SYNs
// and lets in-flight handshakes finish. IP_MINTTL drops the final ACK too (FreeBSD).
// After listen(fd, 0) new clients still get in.
type stop struct{}

func (*kernel) stopIntake(int, *intake, bool) (*stop, error) {
	return nil, fmt.Errorf("this system cannot keep them out: %w", errors.ErrUnsupported)
}

func (*kernel) lift(int, *stop) (*stop, error) { return nil, nil }
func (*kernel) stands(int) bool                { return true }
func (*kernel) removeInherited(int)            {}
func (*kernel) removeMigrated(*net.TCPConn)    {}
func (*kernel) mayReusePort(int) bool          { return false }

func duplicated([]*intake) map[*intake]bool { return nil }

func duplicates(_ int, f func()) bool { f(); return false }

// A flight limits the time that a drain waits for connections that the kernel holds back.
// These systems do not list in-flight handshakes.
type flight struct{ until time.Time }

func newFlight(context.Context, []*draining) *flight {
	return &flight{until: time.Now().Add(drainFlight)}
}

func (*flight) look(context.Context) {}
func (*flight) left() int            { return unknown }
func (*flight) mayUseCookies() bool  { return false }
func (*flight) close()               {}

func (f *flight) extend() { f.until = time.Now().Add(drainFlight) }

// over reports whether the time is over.
func (f *flight) over() bool { return time.Now().After(f.until) }
