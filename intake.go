package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// queuedIsCapped reports whether the length of a long queue is unknown, see Stats.Queued.
const queuedIsCapped = runtime.GOOS == "dragonfly"

const (
	drainLook   = 5 * time.Millisecond // how often a drain checks the queue
	drainFlight = 3 * time.Second      // the maximum wait for in-flight handshakes
	drainReturn = time.Second          // the maximum wait for loops to call Accept again
)

// drain drains listeners, which share one port. It lists the handshakes of the port once
// for all of them. A listener that is closed needs no drain, unless all are.
func drain(ctx context.Context, listeners []*Listener) error {
	fail := func(err error) error { return listeners[0].opError("drain", err) }
	if ctx == nil {
		return fail(errNilContext)
	}
	// A queue that cannot be read cannot be drained. This is checked before anything is
	// changed.
	var drainings []*draining
	for _, l := range listeners {
		switch s, err := l.Stats(); {
		case errors.Is(err, net.ErrClosed) && len(listeners) > 1:
			continue
		case err != nil && lasting(err):
			return fail(err)
		case err == nil && s.Queued == unknown && !queuedIsCapped:
			return fail(fmt.Errorf("this system does not report the length of the queue: %w", errors.ErrUnsupported))
		}
		drainings = append(drainings, &draining{l: l, resumes: l.intake.timesResumed()})
	}
	if len(drainings) == 0 {
		return fail(net.ErrClosed)
	}

	flight := newFlight(ctx, drainings)
	defer flight.close()
	steering := steeringOf(ctx, drainings)
	steering.begin(ctx, func() {
		for _, d := range drainings {
			d.begin(flight.mayUseCookies())
		}
	})
	left := untilDrained(ctx, drainings, flight, steering)
	var copied map[*Listener]bool
	if all := shown(drainings); len(all) > 0 {
		copied = duplicated(all)
	}
	var errs []error
	if left != nil {
		errs = append(errs, left)
	}
	closed := 0
	for _, d := range drainings {
		err := d.end(copied[d.l])
		if errors.Is(err, net.ErrClosed) {
			closed++
			err = nil
		}
		errs = append(errs, err)
	}
	if closed == len(drainings) {
		return fail(net.ErrClosed)
	}
	if err := join(errs); err != nil {
		return fail(err)
	}
	return nil
}

// lasting reports whether an error of Stats means that the queue can never be read. Otherwise
// the drain tries again: on systems that open a kqueue(2) for each reading, the process may
// have no descriptor left until it closes a connection.
func lasting(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, errNotListening) || errors.Is(err, errors.ErrUnsupported)
}

// untilDrained waits until all listeners are drained. If ctx ends first, it returns what is left.
func untilDrained(ctx context.Context, drainings []*draining, flight *flight, steering *steering) error {
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	for ended := false; ; {
		left := DrainError{InFlight: unknown, err: ctx.Err()}
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
func shown(drainings []*draining) (all []*Listener) {
	for _, d := range drainings {
		if d.l.intake.shown.Load() {
			all = append(all, d.l)
		}
	}
	return all
}

// join returns the errors that are not nil as one error. A single error is returned
// unchanged.
func join(errs []error) error {
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

// A draining is one drain of one Listener.
type draining struct {
	l       *Listener
	stop    *stop     // what keeps new clients out; nil if nothing does
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
func stopped(drainings []*draining) bool {
	for _, d := range drainings {
		if d.stop != nil {
			return true
		}
	}
	return false
}

// look checks the queue once and adds its numbers to left.
func (d *draining) look(ctx context.Context, f *flight, left *DrainError) {
	s, err := d.l.Stats()
	if err != nil {
		s = noStats
		if lasting(err) { // a socket that is closed or shut down has no queue
			s.Queued, s.Incomplete = 0, 0
			d.failed, d.done = err, true
		} else {
			left.err = join([]error{left.err, cause(err)})
		}
	}
	unreturned := d.l.gate.unreturned()
	left.Queued = sum(left.Queued, s.Queued)
	left.HeldBack = sum(left.HeldBack, s.Incomplete)
	left.Accepted += unreturned
	if d.done {
		return
	}
	if s.Capacity != unknown && s.Queued >= s.Capacity {
		f.extend()
	}
	if d.resumed() {
		d.done = true
		return
	}
	waiting := d.stop != nil && f.left() != 0 || d.l.mayHoldBack(s.Incomplete)
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

// mayHoldBack reports whether the kernel holds back connections from Accept, or may do so.
func (l *Listener) mayHoldBack(incomplete int) bool {
	return incomplete > 0 || incomplete == unknown && l.filtered
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
	resumes int         // how many times Resume was called
	stop    *stop       // what keeps new clients out; nil if nothing does
	shared  bool        // another process, or other code, may hold the socket
	shown   atomic.Bool // other code had access to the descriptor and may have copied it

	inherited atomic.Pointer[inheritance]
	steering  atomic.Pointer[place] // nil unless a drain steers or has steered clients
}

// begin keeps new clients out, if the system can do that and no earlier drain does. cookies
// means that every handshake may use a SYN cookie.
func (d *draining) begin(cookies bool) {
	in := &d.l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	if d.l.transport == multipathTCP {
		d.why = fmt.Errorf("on an MPTCP socket: %w", errors.ErrUnsupported)
	} else if in.stop == nil && in.resumes == d.resumes {
		err := d.l.raw.Control(func(fd uintptr) { in.stop, d.why = d.l.kernel.stopIntake(int(fd), in, cookies) })
		if err != nil {
			d.why = cause(err)
		}
	}
	d.stop = in.stop
	in.running++
}

// resumed reports whether Resume was called since the drain began.
func (d *draining) resumed() bool { return d.l.intake.timesResumed() != d.resumes }

func (in *intake) timesResumed() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.resumes
}

// errResumed is the reason of a drain that Resume has ended.
var errResumed = errors.New("Resume was called")

// end ends a drain. The error says why new clients are not kept out. If the socket has
// another holder, the last drain that ends lets new clients in again.
func (d *draining) end(copied bool) error {
	in := &d.l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running--
	why := d.why
	switch {
	case d.failed != nil:
		forgetSteering(d.l) // Close has not done it if it ran before the drain joined
		return cause(d.failed)
	case in.resumes != d.resumes:
		why = errResumed
		if in.running == 0 && in.stop == nil { // Resume has not done it, for the same reason
			leaveSteering([]*Listener{d.l})
		}
	case in.shared || copied:
		if why = ErrShared; d.why != nil {
			why = joined{ErrShared, d.why}
		}
		if in.running == 0 {
			if err := d.l.open(); err != nil {
				return err
			}
		}
	case d.why != nil:
	case !d.stands():
		why = fmt.Errorf("%w, which let them in", ErrShared)
	}
	if why == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrStillOpen, why)
}

// stands reports whether the socket still keeps new clients out. It is true for a closed
// socket.
func (d *draining) stands() (yes bool) {
	err := d.l.raw.Control(func(fd uintptr) { yes = d.l.kernel.stands(int(fd)) })
	return yes || err != nil
}

// resume lets new clients in to listeners, and then steers clients to them again. It
// returns one error for each listener.
func resume(listeners []*Listener) []error {
	errs := make([]error, len(listeners))
	var open []*Listener
	for i, l := range listeners {
		in := &l.intake
		in.mu.Lock()
		if err := l.lift(); err != nil {
			errs[i] = l.opError("resume", err)
		} else {
			in.resumes++
			open = append(open, l)
		}
		in.mu.Unlock()
	}
	leaveSteering(open)
	return errs
}

// open lets new clients in again and stops steering them away from l. The caller holds
// intake.mu.
func (l *Listener) open() error {
	if err := l.lift(); err != nil {
		return err
	}
	leaveSteering([]*Listener{l})
	return nil
}

// lift lets new clients in again. If that fails, stop stays set, and the next call tries
// again. The caller holds intake.mu.
func (l *Listener) lift() error {
	in := &l.intake
	var (
		lifted *stop
		operr  error
	)
	err := l.raw.Control(func(fd uintptr) { lifted, operr = l.kernel.lift(int(fd), in.stop) })
	if err != nil { // the socket is closed
		return cause(err)
	}
	if operr != nil {
		return fmt.Errorf("new clients are still kept out: %w", operr)
	}
	if lifted != nil {
		in.lifted(lifted)
	}
	in.stop = nil
	return nil
}

// lifted notes that s is no longer on the socket. Connections may still have it.
func (in *intake) lifted(s *stop) {
	in.inherited.Store(&inheritance{stop: s, lifted: time.Now()})
}

// markShared notes that the socket may have another holder. It lets new clients in again,
// unless a drain is in progress, which will do so when it ends.
func (l *Listener) markShared() error {
	in := &l.intake
	in.mu.Lock()
	defer in.mu.Unlock()
	in.shared = true
	if in.running > 0 {
		return nil
	}
	return l.open()
}

// isShared reports whether another holder has the socket, or may have it.
func (in *intake) isShared() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.shared
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
		if l.reusePort { // c may come from another listener of the group, see tcp_migrate_req
			l.kernel.removeMigrated(c)
		}
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { l.kernel.removeInherited(int(fd)) })
	}
	if now.over || now.lifted.IsZero() || time.Since(now.lifted) < inheritanceLast {
		return
	}
	if s, err := readStats(l.kernel, l.raw, l.transport); err == nil && s.Queued == 0 {
		l.intake.inherited.CompareAndSwap(now, &inheritance{stop: now.stop, over: true})
	}
}
