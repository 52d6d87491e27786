package acceptq

import (
	"net"
	"sync"
	"time"
)

// A gate stands before net's Accept and counts the calls inside. The kernel's queue
// may be empty while a connection that was in it is still on its way out of net's
// Accept, and no look at the queue can tell.
type gate struct {
	mu       sync.Mutex
	moved    sync.Cond // inside has decreased, or the gate is open again
	inside   int       // calls of net's Accept
	shut     bool      // the calls inside are being sent out, and none comes in
	epoch    uint64    // how many times the calls inside have been sent out
	deadline time.Time // the user's
	accepted int       // connections that Accept has returned and no call has followed
}

// enter waits until the gate is open and returns the epoch, for leave. A call that
// was sent out and comes again is not a new call by the user.
func (g *gate) enter(again bool) (epoch uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !again && g.accepted > 0 {
		g.accepted--
	}
	for g.shut {
		g.moved.Wait()
	}
	g.inside++
	return g.epoch
}

// leave reports whether the calls inside have been sent out since the call that now
// leaves entered: then a deadline that has passed may not be the user's. A call can
// be late and leave when the gate is open again.
func (g *gate) leave(epoch uint64, accepted bool) (sentOut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if accepted {
		g.accepted++
	}
	g.inside--
	if g.shut {
		g.moved.Broadcast()
	}
	return g.epoch != epoch
}

// settled reports whether a call of Accept has followed each connection that Accept
// returned. One call after the last connection is not enough: of several loops one
// may be back while another is still busy with its connection. (The first call of a
// new loop cannot be told from the return of an old one.) settled sends out all calls
// inside, so that none is on its way out with a connection.
//
// It waits for them no longer than d.
func (g *gate) settled(ln *net.TCPListener, d time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // by another drain
		g.moved.Wait()
	}
	if g.accepted > 0 {
		return false
	}
	if g.inside > 0 {
		g.sendOut(ln, d)
	}
	return g.accepted == 0 && g.inside == 0
}

// sendOut ends the calls inside by a deadline in the past. A socket that someone made
// blocking (by Fd of a copy, as os/exec does) ignores deadlines, so the wait is
// bounded.
func (g *gate) sendOut(ln *net.TCPListener, d time.Duration) {
	tooLong := false
	defer time.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		tooLong = true
		g.moved.Broadcast()
	}).Stop()
	g.shut = true
	g.epoch++
	ln.SetDeadline(time.Unix(1, 0)) // on a closed listener the calls return anyway
	for g.inside > 0 && !tooLong {
		g.moved.Wait()
	}
	ln.SetDeadline(g.deadline)
	g.shut = false
	g.moved.Broadcast()
}

// unreturned is the number of connections that Accept returned and no call has
// followed.
func (g *gate) unreturned() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.accepted
}

func (g *gate) setDeadline(ln *net.TCPListener, t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // or sendOut would overwrite t
		g.moved.Wait()
	}
	g.deadline = t
	return ln.SetDeadline(t)
}
