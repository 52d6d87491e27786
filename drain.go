package acceptq

import (
	"context"
	"fmt"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
)

// Drain makes l safe to close without resetting connections. It keeps new clients out,
// waits for the in-flight handshakes, and returns when Accept has returned every queued
// connection. The server must continue to call Accept. Drain does not close l.
//
// A nil error means that Close resets no connection. There are two exceptions: a handshake
// that was not finished after 3 seconds, and a connection that the kernel held back for
// longer than that. Any other error is a [*net.OpError] and matches at least one of these.
// Check for them in this order:
//   - [*DrainError] and the error of ctx: ctx ended first.
//   - [ErrStillOpen]: new clients are let in when Drain returns.
//   - [net.ErrClosed]: l is closed.
//   - [errors.ErrUnsupported]: the system does not report the length of the queue.
//   - [syscall.EINVAL]: l is a zero Listener, its socket was shut down, or ctx is nil.
//
// Unless the socket is shared, new clients stay out until [Listener.Close] or
// [Listener.Resume], even if ctx ends. With [WithReusePort] on Linux they usually go to the
// other listeners of the address at once. Otherwise they retry after a second and reach the
// process that listens by then. Drain may be called again and concurrently.
//
// On the BSDs and macOS new clients cannot be kept out. There Drain returns at the first
// moment at which the queue is empty. Under load there may be no such moment, and Drain may
// never return, so give ctx a deadline. When it ends, the error counts the connections that
// Close resets.
//
// To drain l, call Accept, SetDeadline and File on l only, not on its
// [*net.TCPListener]. See the section "Draining" of the package comment.
func (l *Listener) Drain(ctx context.Context) error {
	if !l.ok() {
		return l.opError("drain", sys.ErrNotListening)
	}
	return drainAll(ctx, []*Listener{l})
}

// Resume undoes a drain: l lets new clients in again. A drain that is in progress ends
// with [ErrStillOpen]. If another holder of the socket keeps new clients out, Resume ends
// that too. If new clients already get in, Resume does nothing.
//
// The error is that of the system call that failed to let new clients in. After Close it
// matches [net.ErrClosed].
func (l *Listener) Resume() error {
	if !l.ok() {
		return l.opError("resume", sys.ErrNotListening)
	}
	return resumeAll([]*Listener{l})[0]
}

// ErrStillOpen is the error of a drain that has ended but does not keep new clients out.
// Close resets the clients that connect between the drain and Close. The text of the
// error gives the reason:
//   - The socket has, or may have, another holder. The error then matches [ErrShared] too.
//   - The system has no way to keep clients out, or the socket is an MPTCP socket.
//   - Drain could use neither the socket filter nor the minimum TTL.
//   - [Listener.Resume] was called.
var ErrStillOpen = intake.ErrStillOpen

// ErrShared is the error of a drain of a socket that has, or may have, another holder, see
// [Listener.File] and [Wrap]. An error that matches ErrShared also matches [ErrStillOpen]. If
// the other holder continues to listen, Close resets no client, because the queue stays with
// the socket.
var ErrShared = intake.ErrShared

// A DrainError reports what a drain was still waiting for when its context ended. It
// unwraps to the error of the context. -1 means unknown.
type DrainError struct {
	Queued   int // connections that wait for Accept; Close resets them
	InFlight int // unfinished handshakes that began before the drain
	HeldBack int // connections that the kernel holds back from Accept, see Stats.Incomplete
	Accepted int // connections that Accept has returned to a goroutine that has not called it again

	err error
}

func (e *DrainError) Error() string {
	text := fmt.Sprintf("%v: %v queued, %v in flight", e.err, count(e.Queued), count(e.InFlight))
	if e.HeldBack > 0 {
		text += fmt.Sprintf(", %d held back", e.HeldBack)
	}
	if e.Accepted > 0 {
		text += fmt.Sprintf(", %d accepted by a loop that has not called Accept again", e.Accepted)
	}
	return text
}

// Unwrap returns the error of the context.
func (e *DrainError) Unwrap() error { return e.err }

// drainAll drains listeners, which share one port. The steps of a drain are in
// internal/intake/draining.go.
func drainAll(ctx context.Context, listeners []*Listener) error {
	err := errNilContext
	if ctx != nil {
		err = intake.Drain(ctx, intakes(listeners), func(l intake.Left) error {
			return &DrainError{Queued: l.Queued, InFlight: l.InFlight, HeldBack: l.HeldBack, Accepted: l.Accepted, err: l.Err}
		})
	}
	if err != nil {
		return listeners[0].opError("drain", err)
	}
	return nil
}

// resumeAll undoes a drain of listeners. It returns one error for each listener.
func resumeAll(listeners []*Listener) []error {
	errs := intake.Resume(intakes(listeners))
	for i, err := range errs {
		if err != nil {
			errs[i] = listeners[i].opError("resume", err)
		}
	}
	return errs
}

func intakes(listeners []*Listener) (all []*intake.Intake) {
	for _, l := range listeners {
		all = append(all, &l.intake)
	}
	return all
}

// queue reads what a drain needs to know of the accept queue.
func (l *Listener) queue() (intake.Queue, error) {
	s, err := l.Stats()
	if err != nil {
		return intake.NoQueue, err
	}
	return intake.Queue{Queued: s.Queued, Incomplete: s.Incomplete, Limit: s.Limit, Capacity: s.Capacity}, nil
}
