package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Drain prepares l for a Close that resets nobody: it takes in no new handshake,
// waits for those in flight, and returns once Accept has taken all that is queued
// and has been called again for each, so that every loop that calls it has dealt
// with the last one it took. It does not close; Close does, or the server's
// Shutdown.
//
// When ctx ends first the error is a [*DrainError], which says what Close would
// reset now. After Close, or when Close comes meanwhile, the error matches
// [net.ErrClosed]. Drain may be called again, and by several goroutines.
//
// On Linux clients that come during a drain are not refused: the kernel drops
// their first packet, they try again after a second, and reach whoever listens
// then. A socket filter does that (SO_ATTACH_FILTER, socket(7)), which needs
// CAP_NET_ADMIN since mid-2026; without it a minimum TTL of 255 (IP_MINTTL, ip(7);
// IPV6_MINHOPCOUNT), which lets clients in that send 255, and under which what a
// client sends before it is accepted comes only when it is sent again. Handshakes in flight are
// looked up by sock_diag(7), and waited for at most 3 seconds: a dead client holds
// nothing up. The stop stays until the socket closes. If its descriptor may have
// been copied ([Listener.File], [Listener.SyscallConn], [Wrap]), the stop is
// lifted just before Drain returns, so that the other holder has its clients; if
// that fails, so does Drain. Who hands the socket over needs no Drain, since the
// queue goes with it.
//
// On other systems, and on MPTCP, nothing is changed on the socket: Drain waits
// for the first moment at which the queue is empty, and who comes between that and
// Close is lost. Where the queue cannot be seen the error matches
// [errors.ErrUnsupported].
//
// Connections must be taken, deadlines set and the descriptor handed on by the
// methods of l, not by those of l.TCPListener or of the listener that l wraps: what
// is accepted during a drain inherits the stop, and l lifts it from each. One
// that another holder of the socket takes keeps it: a filter does it no harm, with
// the minimum TTL it hears nothing until that holder sets IP_MINTTL to 0.
//
// What Drain cannot do: connections made by SYN cookies, when the queue
// overflows, have no state to wait for; connections that the kernel holds back
// ([WithDeferAccept], [WithAcceptFilter]) are not queued, and given up after the 3
// seconds; SYNs that hash to a draining member of a
// SO_REUSEPORT group come back after a second; and net/http drops a request that
// it has read when Shutdown begins, see the example. Behind a load balancer begin
// when it has let go of the server.
func (l *Listener) Drain(ctx context.Context) (err error) {
	if ctx == nil {
		return l.opError("drain", errors.New("acceptq: nil context"))
	}
	if !l.ok() {
		return l.opError("drain", errNotListening)
	}
	flight, err := l.beginDrain()
	if err != nil {
		return l.opError("drain", err)
	}
	defer func() {
		if stays := l.endDrain(); stays != nil {
			err = l.opError("drain", errors.Join(stays, err))
		}
	}()

	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	calm := 0 // looks in a row that have seen nobody
	for ended := false; ; {
		inFlight := flight.look()
		s, err := l.Stats()
		if err != nil {
			return l.opError("drain", err)
		}
		if s.Queued == unknown {
			return l.opError("drain", fmt.Errorf("the length of the queue: %w", errors.ErrUnsupported))
		}
		if calm++; s.Queued > 0 || inFlight != 0 && !flight.over() {
			calm = 0
		}
		if calm >= flight.looks() && l.accepts.settled(l.tcp) {
			// One that was on its way through Accept at that moment is counted by
			// now; none can have come in behind it unless nothing was stopped.
			return nil
		}
		if ended {
			return &DrainError{Queued: s.Queued, Incomplete: inFlight, err: ctx.Err()}
		}
		select {
		case <-ctx.Done():
			ended = true // one more look: the error tells of now
		case <-tick.C:
		}
	}
}

const (
	drainLook   = 5 * time.Millisecond // how often a drain looks
	drainFlight = 3 * time.Second      // how long it waits for handshakes in flight
)

// A DrainError says that a drain ended with its context. It unwraps to the
// context's error. If nothing is queued or in flight, a goroutine that took a
// connection has not called Accept again, or cannot be brought out of it because
// the socket was made blocking, see [Listener.File].
type DrainError struct {
	Queued     int // connections that wait for Accept, and that Close would reset
	Incomplete int // handshakes in flight since before the drain; -1 if unknown
	err        error
}

func (e *DrainError) Error() string {
	return fmt.Sprintf("drain: %v: %d queued, %v in flight", e.err, e.Queued, count(e.Incomplete))
}

// Unwrap returns the error of the context.
func (e *DrainError) Unwrap() error { return e.err }

// drains is the part of a Listener that stops the intake of its socket.
type drains struct {
	mu      sync.Mutex
	running int  // drains that have begun and not ended
	shared  bool // another descriptor of this socket may exist
	stopped bool // the stop is in force
}

// beginDrain stops the intake, if no drain before has, and notes the handshakes
// that are in flight after that.
func (l *Listener) beginDrain() (*flight, error) {
	d := &l.drains
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopped {
		if err := l.raw.Control(func(fd uintptr) { d.stopped = l.intake.stop(l.sys, int(fd)) }); err != nil {
			return nil, err
		}
	}
	d.running++
	if !d.stopped {
		return &flight{}, nil // those in flight cannot be told from those to come
	}
	return newFlight(l.sys, l.Addr().(*net.TCPAddr).Port), nil
}

// endDrain lifts the stop from a shared socket when its last drain ends.
func (l *Listener) endDrain() error {
	l.drains.mu.Lock()
	defer l.drains.mu.Unlock()
	l.drains.running--
	return l.liftIfShared()
}

// share notes that there may be another descriptor of the socket from now on, and
// that its holder must not find it stopped.
func (l *Listener) share() error {
	l.drains.mu.Lock()
	defer l.drains.mu.Unlock()
	l.drains.shared = true
	return l.liftIfShared()
}

// liftIfShared is tried again at the next occasion if it fails: with the stop on
// its socket the other holder would never see a client.
func (l *Listener) liftIfShared() error {
	d := &l.drains
	if !d.stopped || !d.shared || d.running > 0 {
		return nil
	}
	var operr error
	err := l.raw.Control(func(fd uintptr) { operr = l.intake.lift(l.sys, int(fd)) })
	if err == nil && operr != nil {
		return fmt.Errorf("new clients are still kept out: %w", operr)
	}
	d.stopped = false // or the socket is closed
	return nil
}

// A flight is the handshakes on a port that were unfinished when the intake
// stopped. Their rows name no listener, so those of another one of this port are
// among them; what begins later is not. The zero flight has none to wait for.
type flight struct {
	sys     *system
	port    int
	waiting map[handshake]struct{} // nil if it could not be found out
	late    bool                   // those that were late for the first look are among them
	next    time.Time              // when to ask the kernel again
	pause   time.Duration          // and how long after that: the answer costs it a walk
	until   time.Time
}

func newFlight(sys *system, port int) *flight {
	now := time.Now()
	f := &flight{sys: sys, port: port, next: now.Add(drainLook), until: now.Add(drainFlight)}
	f.waiting, _ = sys.handshakes(port)
	return f
}

// look returns how many are still unfinished; -1 if that cannot be found out. The
// second time it adds those whose SYN another processor was about to take in when
// the intake stopped.
func (f *flight) look() int {
	if f.waiting == nil {
		return unknown
	}
	if f.late && len(f.waiting) == 0 || time.Now().Before(f.next) {
		return len(f.waiting)
	}
	now, err := f.sys.handshakes(f.port)
	if err != nil {
		return unknown
	}
	f.pause = min(2*f.pause+drainLook, 20*drainLook)
	f.next = time.Now().Add(f.pause)
	if !f.late {
		f.waiting, f.late = now, true
		return len(now)
	}
	for h := range f.waiting {
		if _, unfinished := now[h]; !unfinished {
			delete(f.waiting, h)
		}
	}
	return len(f.waiting)
}

// looks is how many in a row must see nobody. The kernel takes a handshake out of
// its table a moment before it puts the connection into the queue.
func (f *flight) looks() int {
	if f.sys == nil {
		return 1 // nothing was stopped: the first moment will do
	}
	return 2
}

// over reports whether they have been waited for long enough.
func (f *flight) over() bool { return time.Now().After(f.until) }

// A gate stands before net's Accept and knows who is inside. The kernel's queue
// may be empty while a connection that was in it is still on its way out of there,
// and no look at the queue can tell.
type gate struct {
	mu       sync.Mutex
	moved    sync.Cond // inside has sunk, or the gate is open again
	inside   int       // calls of net's Accept
	shut     bool      // all that are inside are sent out, and nobody comes in
	deadline time.Time // the user's
	owed     int       // connections that Accept has returned and no call has followed
}

// enter waits until the gate is open. A call that was sent out and comes again is
// no new call of the user's.
func (g *gate) enter(again bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !again && g.owed > 0 {
		g.owed--
	}
	for g.shut {
		g.moved.Wait()
	}
	g.inside++
}

// leave reports whether the gate is shut: then a deadline that has passed is not
// the user's.
func (g *gate) leave(handed bool) (shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if handed {
		g.owed++
	}
	g.inside--
	if g.shut {
		g.moved.Broadcast()
	}
	return g.shut
}

// settled reports whether a call of Accept has followed each connection that it
// returned. That there was a call after the last would not do: of several loops one
// may be back while another is still busy with what it took. (The first call of a
// new loop cannot be told from the return of another.) It sends out all that are
// inside, so that none is on its way with one.
func (g *gate) settled(ln *net.TCPListener) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // by another drain
		g.moved.Wait()
	}
	if g.owed > 0 {
		return false
	}
	if g.inside > 0 {
		// If someone made the socket blocking, by Fd of a copy as os/exec does, no
		// deadline brings them out. Then this is tried again, until Drain's ctx ends.
		tooLong := false
		defer time.AfterFunc(20*drainLook, func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			tooLong = true
			g.moved.Broadcast()
		}).Stop()
		g.shut = true
		ln.SetDeadline(time.Unix(1, 0)) // long ago; on a closed one they return anyway
		for g.inside > 0 && !tooLong {
			g.moved.Wait()
		}
		ln.SetDeadline(g.deadline)
		g.shut = false
		g.moved.Broadcast()
	}
	return g.owed == 0 && g.inside == 0
}

func (g *gate) setDeadline(ln *net.TCPListener, t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // for a moment
		g.moved.Wait()
	}
	g.deadline = t
	return ln.SetDeadline(t)
}
