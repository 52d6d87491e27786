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

// Drain makes l safe to close without resetting connections. It keeps new clients out,
// waits for the in-flight handshakes, and returns when Accept has returned every queued
// connection. The server must continue to call Accept. Drain does not close l.
//
// Where new clients cannot be kept out, as on the BSDs and macOS, Drain returns at the first
// moment at which the queue is empty. Under load there may be none, so give ctx a deadline:
// without one Drain may not end. The error then counts the connections that Close resets.
//
// A nil error means that Close resets no connection, except one whose handshake was not
// finished, or that the kernel held back, for 3 seconds. Otherwise the error is a
// [*net.OpError] and matches one of these. Check for them in this order:
//   - [*DrainError] and the error of ctx: ctx ended first.
//   - [ErrStillOpen]: new clients are let in when Drain returns.
//   - [net.ErrClosed]: l is closed.
//   - [errors.ErrUnsupported]: the system does not report the length of the queue.
//
// Unless the socket is shared, new clients stay out until [Listener.Close] or
// [Listener.Resume], even if ctx ends. They retry after a second and reach the process
// that listens by then. Drain may be called again and concurrently.
//
// To drain l, call Accept, SetDeadline and File on l only, not on its
// [*net.TCPListener]. See the section "Draining" of the package comment.
func (l *Listener) Drain(ctx context.Context) error {
	if !l.ok() {
		return l.opError("drain", errNotListening)
	}
	return drain(ctx, []*Listener{l})
}

// Resume undoes a drain: l lets new clients in again. A drain that is in progress ends
// with [ErrStillOpen]. If l does not keep new clients out, Resume does nothing.
//
// If the kernel refuses to let new clients in, the error says so. After Close the error
// matches [net.ErrClosed].
func (l *Listener) Resume() error {
	if !l.ok() {
		return l.opError("resume", errNotListening)
	}
	l.intake.mu.Lock()
	defer l.intake.mu.Unlock()
	if err := l.open(); err != nil {
		return l.opError("resume", err)
	}
	l.intake.resumes++
	return nil
}

// ErrStillOpen is the error of a drain that has ended but does not keep new clients out.
// Close resets the clients that connect between the drain and Close. The text of the
// error gives the reason:
//   - The socket has another holder, or that holder let new clients in. The error then
//     matches [ErrShared] too.
//   - The system has no way to keep clients out, or the socket is an MPTCP socket.
//   - Drain could use neither the socket filter nor the minimum TTL.
//   - [Listener.Resume] was called.
var ErrStillOpen = errors.New("new clients are still let in")

// ErrShared is the error of a drain of a socket that has, or may have, another holder: see
// [Listener.File] and [Wrap]. It comes with [ErrStillOpen]. If the other holder continues
// to listen, Close resets no client, because the queue stays with the socket.
var ErrShared = errors.New("the socket has another holder")

// A DrainError reports what a drain was still waiting for when its context ended. It
// unwraps to the error of the context. -1 means unknown.
type DrainError struct {
	Queued   int // connections that wait for Accept; Close resets them
	InFlight int // unfinished handshakes that began before the drain
	HeldBack int // connections that the kernel holds back from Accept, see Stats.Incomplete
	Accepted int // accepted connections whose loop has not called Accept again

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

// queuedIsCapped reports whether the length of a long queue is unknown, see Stats.Queued.
const queuedIsCapped = runtime.GOOS == "dragonfly"

const (
	drainLook   = 5 * time.Millisecond // how often a drain checks the queue
	drainFlight = 3 * time.Second      // the maximum wait for in-flight handshakes
	drainReturn = time.Second          // the maximum wait for loops to call Accept again
)

// drain drains listeners, which share one port. It lists the handshakes of the port once
// for all of them.
func drain(ctx context.Context, listeners []*Listener) (err error) {
	fail := func(err error) error { return listeners[0].opError("drain", err) }
	if ctx == nil {
		return fail(errNilContext)
	}
	// A queue that cannot be read cannot be drained. This is checked before anything is
	// changed.
	for _, l := range listeners {
		if s, err := l.Stats(); lasting(err) {
			return fail(err)
		} else if err == nil && s.Queued == unknown && !queuedIsCapped {
			return fail(fmt.Errorf("this system does not report the length of the queue: %w", errors.ErrUnsupported))
		}
	}

	flight := newFlight(ctx, listeners)
	defer flight.close()
	// Steering begins before the sockets drop SYNs: a dropped SYN delays its client by a
	// second.
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
			ended = true // look once more, so that the error reports the current numbers
		case <-tick.C:
		}
	}
}

// join joins the errors of several listeners or attempts on one line. Each text appears
// once, because shards usually fail for the same reason. A single error is returned
// unchanged.
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
	empty int       // how many looks in a row have found no connection
	since time.Time // when the first of these looks was
	done  bool

	resumes int  // of the intake when the drain began
	stuck   bool // calls of Accept did not return although their deadline has passed
}

// stopped reports whether at least one listener keeps new clients out. If none does, new
// handshakes cannot be told apart from those that began before the drain.
func stopped(drainings []*draining) bool {
	return slices.ContainsFunc(drainings, func(d *draining) bool { return d.stop != nil })
}

// look checks the queue once and adds its numbers to left.
func (d *draining) look(ctx context.Context, f *flight, left *DrainError) error {
	s, err := d.l.Stats()
	if lasting(err) {
		return err
	}
	left.err = join([]error{left.err, cause(err)})
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
	if !d.l.intake.keeps(d) {
		d.stop, d.why, d.done = nil, errors.New("Resume was called"), true
		return nil
	}
	heldBack := s.Incomplete > 0 || s.Incomplete == unknown && d.l.filtered
	waiting := d.stop != nil && f.left() != 0 || heldBack
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
	// The queue is empty, but a call of Accept may still hold a connection that it has
	// not returned yet.
	d.done = d.settled(ctx) || time.Since(d.since) > drainReturn
	return nil
}

// lasting reports whether err means that the queue can never be read. Otherwise the drain
// tries again: on systems that open a kqueue(2) for each reading, the process may have no
// descriptor left until it closes a connection.
func lasting(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, errNotListening)
}

// settled asks the gate whether Accept holds no connection. It does not wait longer than
// ctx. On a blocking socket the calls of Accept ignore deadlines, so only the first
// attempt waits.
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

// sum adds two numbers. The sum is unknown if one of them is.
func sum(a, b int) int {
	if a == unknown || b == unknown {
		return unknown
	}
	return a + b
}

// looks returns how many looks in a row must find no connection. One look is not enough:
// the kernel removes a handshake from its table shortly before it adds the connection to
// the queue.
func (d *draining) looks() int {
	if d.stop == nil {
		return 1 // new clients still connect, so a second empty look may never come
	}
	return 2
}

// An intake holds what a drain has changed on the socket of a Listener. No other code
// changes these settings.
type intake struct {
	mu      sync.Mutex
	running int         // the number of drains in progress
	resumes int         // the number of calls of Resume
	stop    *stop       // what keeps new clients out; nil if nothing does
	shared  bool        // another process, or other code, may hold the socket
	shown   atomic.Bool // other code had access to the descriptor and may have copied it

	inherited atomic.Pointer[inheritance]
	steering  atomic.Pointer[steering] // nil unless a drain steers or has steered clients
}

// beginDrain keeps new clients out, if the system can do that and no earlier drain does.
func (l *Listener) beginDrain(f *flight) (*draining, error) {
	in := &l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	d := &draining{l: l}
	if l.transport == multipathTCP {
		d.why = fmt.Errorf("on an MPTCP socket: %w", errors.ErrUnsupported)
	} else if in.stop == nil {
		err := l.raw.Control(func(fd uintptr) { in.stop, d.why = l.kernel.stopIntake(int(fd), in, f) })
		if err != nil {
			return nil, err
		}
	}
	d.stop, d.resumes = in.stop, in.resumes
	in.running++
	return d, nil
}

// end ends a drain. The error says why new clients are not kept out. If the socket has
// another holder, the last drain that ends lets new clients in again.
func (d *draining) end(waited, copied bool) error {
	in := &d.l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running--
	switch {
	case d.stop == nil && (in.shared || copied) && d.why != nil:
		d.why = fmt.Errorf("%w: %w", ErrShared, d.why)
	case d.stop == nil:
	case in.shared || copied:
		d.why = ErrShared
		if in.running == 0 {
			if err := d.l.open(); err != nil {
				return err
			}
		}
	case !d.stands():
		d.why = fmt.Errorf("%w, which let them in", ErrShared)
	}
	if !waited || d.why == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrStillOpen, d.why)
}

// stands reports whether the socket still keeps new clients out. It is true for a closed
// socket.
func (d *draining) stands() (yes bool) {
	err := d.l.raw.Control(func(fd uintptr) { yes = d.l.kernel.stands(int(fd), d.stop) })
	return yes || err != nil
}

// open lets new clients in again and stops steering them away from l. If that fails, stop
// stays set, and the next call tries again.
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

// markShared notes that the socket may have another holder. It lets new clients in again,
// unless a drain is in progress, which will do so when it ends.
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

// keeps reports whether the state of the intake is still that with which d began: nothing
// has let new clients in, and Resume was not called.
func (in *intake) keeps(d *draining) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.resumes == d.resumes && (d.stop == nil || in.stop == d.stop)
}

// An inheritance is what accepted connections may have inherited from the listening
// socket, because they were made while it kept new clients out.
type inheritance struct {
	stop   *stop
	lifted time.Time // when the stop was removed; zero while it is in force
	over   bool      // the queue can no longer hold such a connection
}

// inheritanceLast is how long after the removal of a stop the kernel may still queue a
// connection that was made before it.
const inheritanceLast = 100 * time.Millisecond

// removeStop removes from c, which Accept is about to return, what c inherited from l.
// before is the inheritance when the call of Accept began. It is needed because another
// call may have found the queue empty, and set over, after this call had taken c.
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
