package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Drain makes l safe to close without resetting connections. It keeps out new
// clients, waits for the handshakes in flight, and returns once Accept has taken
// every queued connection and each loop that took one has called Accept again. It
// does not close l: call Close or the server's Shutdown next.
//
// nil means that Close resets nobody. Otherwise the error is a [*net.OpError] and
// matches
//   - a [*DrainError] and the error of ctx, when ctx ended first
//   - [ErrStillOpen], when the wait is over but new clients are let in again
//   - [net.ErrClosed], when l was closed before or meanwhile
//   - [errors.ErrUnsupported], when the system does not tell the queue's length
//
// New clients are kept out until l is closed or [Listener.Resume] is called, also
// after an error. Their SYN is dropped, so they retry a second later and reach
// whichever process listens by then. Drain may be called again, and concurrently.
//
// Accept connections, set deadlines and copy the descriptor by the methods of l
// while it drains, not by those of [Listener.TCPListener] or of a listener that l
// wraps. The section "Draining" of the package comment says how it works and what it
// cannot do.
func (l *Listener) Drain(ctx context.Context) error {
	if !l.ok() {
		return l.opError("drain", errNotListening)
	}
	return drain(ctx, []*Listener{l})
}

// Resume undoes a drain: new clients are let in again. Drains that are waiting end
// with [ErrStillOpen]. It does nothing if l is not draining.
//
// After Close the error matches [net.ErrClosed].
func (l *Listener) Resume() error {
	if !l.ok() {
		return l.opError("resume", errNotListening)
	}
	l.intake.mu.Lock()
	defer l.intake.mu.Unlock()
	if err := l.open(); err != nil {
		return l.opError("resume", err)
	}
	return nil
}

// ErrStillOpen is the error of a drain that waited for every handshake and every
// queued connection that it could see, but new clients are let in when it returns:
// Close resets those that connect in between. The reason is in its text:
//   - The socket has another holder, who must not lose its clients: see
//     [Listener.File] and [Wrap]. Nobody is lost if that holder goes on listening.
//   - This system, or MPTCP, has no way to keep them out.
//   - The kernel refused both ways to keep them out.
//   - [Listener.Resume] was called.
var ErrStillOpen = errors.New("new clients are still let in")

// A DrainError says what a drain was still waiting for when its context ended. It
// unwraps to the context's error. A number that cannot be known is -1.
type DrainError struct {
	Queued   int // connections that wait for Accept; Close resets them
	InFlight int // handshakes that began before the drain and are not finished
	HeldBack int // connections that the kernel holds back from Accept, see Stats.Incomplete
	Accepted int // connections that Accept returned to a loop that has not called it again

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

// queuedIsCapped says that a long queue is told as unknown, see Stats.Queued.
const queuedIsCapped = runtime.GOOS == "dragonfly"

const (
	drainLook   = 5 * time.Millisecond // how often a drain looks
	drainFlight = 3 * time.Second      // how long it waits for handshakes in flight
	drainReturn = time.Second          // and for loops that have not called Accept again
)

// drain drains listeners, which are of one port, with one look at its handshakes for
// all of them.
func drain(ctx context.Context, listeners []*Listener) (err error) {
	fail := func(err error) error { return listeners[0].opError("drain", err) }
	if ctx == nil {
		return fail(errors.New("nil context"))
	}
	// A queue that cannot be read cannot be drained, and nothing is changed then.
	for _, l := range listeners {
		if s, err := l.Stats(); err != nil {
			return fail(err)
		} else if s.Queued == unknown && !queuedIsCapped {
			return fail(fmt.Errorf("the length of the queue: %w", errors.ErrUnsupported))
		}
	}

	flight := newFlight(ctx, listeners)
	defer flight.close()
	// Steering comes first: a SYN that is dropped costs its client a second.
	steering := steeringOf(listeners)
	steering.look(ctx, flight, false)
	var drainings []*draining
	defer func() {
		var copies map[*Listener]bool
		if slices.ContainsFunc(drainings, func(d *draining) bool { return d.l.intake.shown.Load() }) {
			copies = duplicated(listeners)
		}
		errs := []error{cause(err)}
		for _, d := range drainings {
			errs = append(errs, d.end(err == nil, copies[d.l]))
		}
		if err = join(errs); err != nil {
			err = fail(err)
		}
	}()
	for _, l := range listeners {
		d, err := l.beginDrain(flight)
		if err != nil {
			return err
		}
		drainings = append(drainings, d)
	}

	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	ended := false
	for looks := 0; ; looks++ {
		left := DrainError{InFlight: unknown, err: ctx.Err()}
		if stopped(drainings) {
			flight.look(ctx)
			left.InFlight = flight.left()
		}
		done := true
		for _, d := range drainings {
			if err := d.look(ctx, flight, &left); err != nil {
				return err
			}
			done = done && d.done
		}
		if done {
			return nil
		}
		steering.look(ctx, flight, looks > 0 && flight.left() == 0)
		if ended {
			return &left
		}
		select {
		case <-ctx.Done():
			ended = true // one more look: the error describes the present
		case <-tick.C:
		}
	}
}

// join joins the errors of several listeners or attempts on one line, each text once:
// 64 shards mostly fail alike. A single error stays as it is.
func join(errs []error) (joined error) {
	seen := make(map[string]bool)
	for _, err := range errs {
		switch {
		case err == nil || seen[err.Error()]:
			continue
		case joined == nil:
			joined = err
		default:
			joined = fmt.Errorf("%w; %w", joined, err)
		}
		seen[err.Error()] = true
	}
	return joined
}

// A draining is one drain of one Listener.
type draining struct {
	l     *Listener
	stop  *stop     // what keeps new clients out; nil if nothing does
	why   error     // why nothing does
	empty int       // how many looks in a row have found nobody waiting
	since time.Time // when the first of them was
	done  bool
	stuck bool // calls of Accept did not come out
}

// stopped reports whether new clients are kept out of one at least. Otherwise those in
// flight cannot be told from those to come.
func stopped(drainings []*draining) bool {
	return slices.ContainsFunc(drainings, func(d *draining) bool { return d.stop != nil })
}

// look looks at the queue once, and adds what it finds to left.
func (d *draining) look(ctx context.Context, f *flight, left *DrainError) error {
	s, err := d.l.Stats()
	if err != nil {
		return err
	}
	unreturned := d.l.gate.unreturned()
	left.Queued = sum(left.Queued, s.Queued)
	left.HeldBack = sum(left.HeldBack, s.Incomplete)
	left.Accepted += unreturned
	if d.done {
		return nil
	}
	if s.Capacity != unknown && s.Queued >= s.Capacity {
		f.extend()
	}
	if d.stop != nil && !d.l.intake.stoppedBy(d.stop) {
		d.stop, d.why, d.done = nil, errors.New("Resume was called"), true
		return nil
	}
	waiting := d.stop != nil && f.left() != 0 || s.Incomplete > 0
	if s.Queued != 0 || waiting && !f.over() {
		d.empty = 0
		return nil
	}
	if d.empty++; d.empty == 1 {
		d.since = time.Now()
	}
	if d.empty < d.looks() {
		return nil
	}
	// A connection that was on its way out of Accept is counted by now. No other
	// can have come in behind it, unless nothing keeps new clients out.
	d.done = d.settled(ctx) || time.Since(d.since) > drainReturn
	return nil
}

// settled asks the gate, and waits no longer than ctx has left. A socket that was made
// blocking is waited for once.
func (d *draining) settled(ctx context.Context) bool {
	wait := 20 * drainLook
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end))
	}
	if d.stuck {
		wait = drainLook
	}
	settled := d.l.gate.settled(d.l.tcp, max(wait, drainLook))
	d.stuck = !settled && d.l.gate.unreturned() == 0
	return settled
}

// sum is unknown if a part of it is.
func sum(a, b int) int {
	if a == unknown || b == unknown {
		return unknown
	}
	return a + b
}

// looks is how many looks in a row must find nobody. The kernel takes a handshake out
// of its table a moment before it puts the connection into the queue.
func (d *draining) looks() int {
	if d.stop == nil {
		return 1 // the first moment must do: others come in all the time
	}
	return 2
}

// An intake lets new clients into a Listener, or is stopped by a drain. It is the
// only owner of what a drain changes on the socket.
type intake struct {
	mu      sync.Mutex
	running int         // drains
	stop    *stop       // what keeps new clients out; nil if nothing does
	shared  bool        // another holder has the socket, or may have it
	shown   atomic.Bool // someone saw the descriptor, and may have copied it

	inherited atomic.Pointer[inheritance]
	steering  atomic.Pointer[steering] // of the drain that runs, or that ended well
}

// beginDrain stops the intake, if that can be done and no drain before has.
func (l *Listener) beginDrain(f *flight) (*draining, error) {
	in := &l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	d := &draining{l: l}
	if in.stop == nil {
		err := l.raw.Control(func(fd uintptr) { in.stop, d.why = l.kernel.stopIntake(int(fd), in, f) })
		if err != nil {
			return nil, err
		}
	}
	d.stop = in.stop
	in.running++
	return d, nil
}

// end ends a drain and says why it does not keep new clients out. With another holder
// of the socket the last drain lets them in again.
func (d *draining) end(waited, copied bool) error {
	in := &d.l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running--
	switch {
	case d.stop == nil:
	case in.shared || copied:
		d.why = errors.New("the socket has another holder")
		if in.running == 0 {
			if err := d.l.open(); err != nil {
				return err
			}
		}
	case !d.stands():
		d.why = errors.New("another holder of the socket let them in")
	}
	if !waited || d.why == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrStillOpen, d.why)
}

// stands reports whether what keeps new clients out is still on the socket. Of a closed
// one that is no question.
func (d *draining) stands() (yes bool) {
	err := d.l.raw.Control(func(fd uintptr) { yes = d.l.kernel.stands(int(fd), d.stop) })
	return yes || err != nil
}

// open lets new clients in again, and steers them to l. If it fails it is tried again at
// the next occasion: another holder of the socket would never see a client.
func (l *Listener) open() error {
	in := &l.intake
	var operr error
	err := l.raw.Control(func(fd uintptr) {
		if in.stop != nil {
			operr = l.kernel.lift(int(fd), in.stop)
		}
	})
	if err != nil { // the socket is closed
		return cause(err)
	}
	if operr != nil {
		return fmt.Errorf("new clients are still kept out: %w", operr)
	}
	if in.stop != nil {
		in.inherited.Store(&inheritance{stop: in.stop, lifted: time.Now()})
	}
	in.stop = nil
	if s := in.steering.Load(); s != nil {
		s.leave(l)
	}
	return nil
}

// markShared notes that another holder of the socket may exist from now on. New clients
// are let in again, unless a drain is running and will do that when it ends.
func (l *Listener) markShared() error {
	in := &l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	in.shared = true
	if in.stop == nil || in.running > 0 {
		return nil
	}
	return l.open()
}

// stoppedBy reports whether s still keeps new clients out.
func (in *intake) stoppedBy(s *stop) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.stop == s
}

// An inheritance is what connections that are accepted may have inherited from a
// listening socket that was stopped when they were made.
type inheritance struct {
	stop   *stop
	lifted time.Time // when the stop was lifted; zero while it is in force
	over   bool      // no such connection can be in the queue any more
}

// inheritanceLast is how long after the lift a connection may still come into the
// queue that was made before it.
const inheritanceLast = 100 * time.Millisecond

// removeStop takes from c, which was accepted just now, what it inherited from a stopped
// listener. before is what could be inherited when the call of Accept began: the queue
// may have been seen empty by another call while this one had c already.
func (l *Listener) removeStop(c *net.TCPConn, before *inheritance) {
	now := l.intake.inherited.Load()
	if now == nil || now.over && before == now {
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { l.kernel.removeInherited(int(fd), now.stop) })
	}
	if now.over || now.lifted.IsZero() || time.Since(now.lifted) < inheritanceLast {
		return
	}
	if s, err := readStats(l.kernel, l.raw, l.transport); err == nil && s.Queued == 0 {
		l.intake.inherited.CompareAndSwap(now, &inheritance{stop: now.stop, over: true})
	}
}
