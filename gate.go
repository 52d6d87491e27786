package acceptq

import (
	"net"
	"sync"
	"time"
)

// A gate counts the calls that are inside net's Accept. A drain needs that number: the
// queue can be empty while net's Accept holds a connection that it has not returned yet.
type gate struct {
	mu       sync.Mutex
	moved    sync.Cond // signals that inside has decreased or that the gate is open again
	inside   int       // the number of calls inside net's Accept
	shut     bool      // the calls inside are being ended, and no new call may enter
	epoch    uint64    // how many times the calls inside have been ended
	deadline time.Time // the deadline that the caller of the package has set
	accepted int       // connections that Accept returned, minus the calls of Accept since
}

// enter waits until the gate is open. It returns the epoch, for leave. If again is true,
// the gate has ended this call before, so it is not a new call of Accept.
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

// leave reports whether the gate has ended the calls inside since this call entered. If
// so, the deadline that has passed may be that of the gate. A call can leave late, when
// the gate is already open again.
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

// settled reports whether Accept has been called again for each connection that it
// returned. One call after the last connection is not enough: with several loops, one
// may call Accept while another is still busy with its connection. A new loop cannot be
// told apart from an old loop that calls again.
//
// settled ends all calls inside, so that none of them holds a connection. It waits for
// at most d.
func (g *gate) settled(ln *net.TCPListener, d time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // another drain has shut the gate
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

// sendOut ends the calls inside with a deadline in the past. A blocking socket ignores
// deadlines, so the wait is bounded. The Fd method of a copy makes it blocking, and
// os/exec calls that method.
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
	ln.SetDeadline(time.Unix(1, 0)) // fails on a closed listener, whose calls return anyway
	for g.inside > 0 && !tooLong {
		g.moved.Wait()
	}
	ln.SetDeadline(g.deadline)
	g.shut = false
	g.moved.Broadcast()
}

// unreturned returns the number of connections that Accept returned to a loop that has
// not called it again.
func (g *gate) unreturned() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.accepted
}

func (g *gate) setDeadline(ln *net.TCPListener, t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut { // sendOut would overwrite t
		g.moved.Wait()
	}
	g.deadline = t
	return ln.SetDeadline(t)
}
