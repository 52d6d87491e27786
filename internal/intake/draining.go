package intake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// queuedIsCapped reports whether the length of a long queue is unknown, see Stats.Queued.
const queuedIsCapped = runtime.GOOS == "dragonfly"

const (
	DrainLook   = 5 * time.Millisecond // how often a drain checks the queue
	DrainFlight = 3 * time.Second      // the maximum wait for in-flight handshakes
	drainReturn = time.Second          // the maximum wait for loops to call Accept again
)

// Drain drains listeners, which share one port. It lists the handshakes of the port once
// for all of them. A listener that is closed needs no drain, unless all are.
func Drain(ctx context.Context, listeners []*Intake, report func(Left) error) error {
	// A queue that cannot be read cannot be drained. This is checked before anything is
	// changed.
	var drainings []*Draining
	for _, l := range listeners {
		switch s, err := l.queue(); {
		case errors.Is(err, net.ErrClosed) && len(listeners) > 1:
			continue
		case err != nil && Lasting(err):
			return err
		case err == nil && s.Queued == sys.Unknown && !queuedIsCapped:
			return fmt.Errorf("this system does not report the length of the queue: %w", errors.ErrUnsupported)
		}
		drainings = append(drainings, &Draining{L: l, resumes: l.timesResumed()})
	}
	if len(drainings) == 0 {
		return net.ErrClosed
	}

	flight := NewFlight(ctx, drainings)
	defer flight.close()
	steering := steeringOf(ctx, drainings)
	steering.begin(ctx, func() {
		for _, d := range drainings {
			d.Begin(flight.mayUseCookies())
		}
	})
	left := untilDrained(ctx, drainings, flight, steering)
	var copied map[*Intake]bool
	if all := shown(drainings); len(all) > 0 {
		copied = duplicated(all)
	}
	var errs []error
	if left != nil {
		errs = append(errs, report(*left))
	}
	closed := 0
	for _, d := range drainings {
		err := d.end(copied[d.L])
		if errors.Is(err, net.ErrClosed) {
			closed++
			err = nil
		}
		errs = append(errs, err)
	}
	if closed == len(drainings) {
		return net.ErrClosed
	}
	if err := Join(errs); err != nil {
		return err
	}
	return nil
}

// Lasting reports whether an error of Stats means that the queue can never be read. Otherwise
// the drain tries again: on systems that open a kqueue(2) for each reading, the process may
// have no descriptor left until it closes a connection.
func Lasting(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, sys.ErrNotListening) || errors.Is(err, errors.ErrUnsupported)
}

// untilDrained waits until all listeners are drained. If ctx ends first, it returns what is left.
func untilDrained(ctx context.Context, drainings []*Draining, flight *flight, steering *Steering) *Left {
	tick := time.NewTicker(DrainLook)
	defer tick.Stop()
	for ended := false; ; {
		left := Left{InFlight: sys.Unknown, Err: ctx.Err()}
		if stopped(drainings) {
			flight.look(ctx)
			left.InFlight = flight.left()
		}
		done := true
		for _, d := range drainings {
			d.look(ctx, flight, &left)
			done = done && d.done
		}
		switch {
		case done:
			return nil
		case ended:
			return &left
		}
		steering.look(ctx)
		select {
		case <-ctx.Done():
			ended = true // look once more, so that the error reports the current numbers
		case <-tick.C:
		}
	}
}

// shown returns the listeners whose descriptor other code may have copied.
func shown(drainings []*Draining) (all []*Intake) {
	for _, d := range drainings {
		if d.L.Shown.Load() {
			all = append(all, d.L)
		}
	}
	return all
}

// Join returns the errors that are not nil as one error. A single error is returned
// unchanged.
func Join(errs []error) error {
	var all joined
	for _, err := range errs {
		if err != nil {
			all = append(all, err)
		}
	}
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	return all
}

// joined holds the errors of several listeners or attempts. Its text is one line, in which
// each text appears once, because shards usually fail for the same reason.
type joined []error

func (j joined) Error() string {
	var texts []string
	seen := make(map[string]bool)
	for _, err := range j {
		if text := err.Error(); !seen[text] {
			seen[text] = true
			texts = append(texts, text)
		}
	}
	return strings.Join(texts, "; ")
}

func (j joined) Unwrap() []error { return j }

// A Queue is the state of an accept queue. -1 means unknown.
type Queue struct{ Queued, Incomplete, Limit, Capacity int }

// NoQueue is a Queue without a known number.
var NoQueue = Queue{sys.Unknown, sys.Unknown, sys.Unknown, sys.Unknown}

// A Left is what a drain was still waiting for when its context ended. -1 means unknown.
type Left struct {
	Queued   int   // connections that wait for Accept
	InFlight int   // unfinished handshakes that began before the drain
	HeldBack int   // connections that the kernel holds back from Accept
	Accepted int   // accepted connections whose loop has not called Accept again
	Err      error // the error of the context
}

// A Draining is one drain of one listener.
type Draining struct {
	L       *Intake
	stop    *Stop     // what keeps new clients out; nil if nothing does
	why     error     // why nothing does
	resumes int       // intake.resumes when the drain began
	empty   int       // how many looks in a row have found no connection
	since   time.Time // when the first of these looks was
	done    bool
	failed  error // why the queue is gone: the listener was closed, or the socket shut down
	stuck   bool  // calls of Accept did not return although their deadline has passed
}

// stopped reports whether at least one listener keeps new clients out. If none does, new
// handshakes cannot be told apart from those that began before the drain.
func stopped(drainings []*Draining) bool {
	for _, d := range drainings {
		if d.stop != nil {
			return true
		}
	}
	return false
}

// look checks the queue once and adds its numbers to left.
func (d *Draining) look(ctx context.Context, f *flight, left *Left) {
	s, err := d.L.queue()
	if err != nil {
		s = NoQueue
		if Lasting(err) { // a socket that is closed or shut down has no queue
			s.Queued, s.Incomplete = 0, 0
			d.failed, d.done = err, true
		} else {
			left.Err = Join([]error{left.Err, sys.Cause(err)})
		}
	}
	unreturned := d.L.Gate.Unreturned()
	left.Queued = sum(left.Queued, s.Queued)
	left.HeldBack = sum(left.HeldBack, s.Incomplete)
	left.Accepted += unreturned
	if d.done {
		return
	}
	if s.Capacity != sys.Unknown && s.Queued >= s.Capacity {
		f.extend()
	}
	if d.resumed() {
		d.done = true
		return
	}
	waiting := d.stop != nil && f.left() != 0 || d.L.mayHoldBack(s.Incomplete)
	if s.Queued != 0 || waiting && !f.over() {
		d.empty = 0
		return
	}
	if d.empty++; d.empty == 1 {
		d.since = time.Now()
	}
	if d.empty < d.looks() {
		return
	}
	// The queue is empty, but a call of Accept may still hold a connection that it has
	// not returned yet.
	d.done = d.settled(ctx) || time.Since(d.since) > drainReturn
}

// settled asks the gate whether Accept holds no connection. It does not wait longer than
// ctx. On a blocking socket the calls of Accept ignore deadlines, so only the first
// attempt waits.
func (d *Draining) settled(ctx context.Context) bool {
	wait := 20 * DrainLook
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end))
	}
	if d.stuck {
		wait = DrainLook
	}
	settled := d.L.Gate.settled(d.L.TCP, max(wait, DrainLook))
	d.stuck = !settled && d.L.Gate.Unreturned() == 0
	return settled
}

// sum adds two numbers. The sum is unknown if one of them is.
func sum(a, b int) int {
	if a == sys.Unknown || b == sys.Unknown {
		return sys.Unknown
	}
	return a + b
}

// looks returns how many looks in a row must find no connection. One look is not enough:
// the kernel removes a handshake from its table shortly before it adds the connection to
// the queue.
func (d *Draining) looks() int {
	if d.stop == nil {
		return 1 // new clients still connect, so a second empty look may never come
	}
	return 2
}

// Begin keeps new clients out, if the system can do that and no earlier drain does. cookies
// means that every handshake may use a SYN cookie.
func (d *Draining) Begin(cookies bool) {
	in := d.L
	in.Mu.Lock()
	defer in.Mu.Unlock()
	if d.L.mptcp {
		d.why = fmt.Errorf("on an MPTCP socket: %w", errors.ErrUnsupported)
	} else if in.Stop == nil && in.resumes == d.resumes {
		err := d.L.Raw.Control(func(fd uintptr) { in.Stop, d.why = stopFor(d.L.Calls, int(fd), in, cookies) })
		if err != nil {
			d.why = sys.Cause(err)
		}
	}
	d.stop = in.Stop
	in.Running++
}

// resumed reports whether Resume was called since the drain began.
func (d *Draining) resumed() bool { return d.L.timesResumed() != d.resumes }

// end ends a drain. The error says why new clients are not kept out. If the socket has
// another holder, the last drain that ends lets new clients in again.
func (d *Draining) end(copied bool) error {
	in := d.L
	in.Mu.Lock()
	defer in.Mu.Unlock()
	in.Running--
	in.sole = false
	why := d.why
	switch {
	case d.failed != nil:
		forgetSteering(d.L) // Close has not done it if it ran before the drain joined
		return sys.Cause(d.failed)
	case in.resumes != d.resumes:
		why = errResumed
		if in.Running == 0 && in.Stop == nil { // Resume has not done it, for the same reason
			leaveSteering([]*Intake{d.L})
		}
	case in.Shared || copied:
		if why = ErrShared; d.why != nil {
			why = joined{ErrShared, d.why}
		}
		if in.Running == 0 {
			if err := d.L.open(); err != nil {
				return err
			}
		}
	case d.why != nil:
	case !d.stands():
		why = fmt.Errorf("%w, which let them in", ErrShared)
	}
	if why == nil {
		in.sole = !in.Lent.Load()
		return nil
	}
	return fmt.Errorf("%w: %w", ErrStillOpen, why)
}

// stands reports whether the socket still keeps new clients out. It is true for a closed
// socket.
func (d *Draining) stands() (yes bool) {
	err := d.L.Raw.Control(func(fd uintptr) { yes = stands(d.L.Calls, int(fd)) })
	return yes || err != nil
}

// errResumed is the reason of a drain that Resume has ended.
var errResumed = errors.New("Resume was called")
