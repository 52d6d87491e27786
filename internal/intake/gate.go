package intake

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// A gate counts the calls that are inside net's Accept. A drain needs that number: the
// queue can be empty while net's Accept holds a connection that it has not returned yet.
type gate struct {
	Mu       sync.Mutex
	moved    sync.Cond // signals that inside has decreased or that the gate is open again
	Inside   int       // the number of calls inside net's Accept
	shut     bool      // the calls inside are being ended, and no new call may enter
	Epoch    uint64    // how many times the calls inside have been ended
	deadline time.Time // the deadline that the caller of the package has set
	Accepted int       // connections that Accept returned, minus the calls of Accept since
	failed   int       // errors that Accept returned, minus the calls of Accept since
}

// Enter waits until the gate is open. It returns the epoch, for leave. If again is true,
// the gate has ended this call before, so it is not a new call of Accept.
func (g *gate) Enter(again bool) (epoch uint64) {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	switch {
	case again:
	case g.failed > 0: // a loop that polls with deadlines must not stand in for a busy one
		g.failed--
	case g.Accepted > 0:
		g.Accepted--
	}
	for g.shut {
		g.moved.Wait()
	}
	g.Inside++
	return g.Epoch
}

// Leave notes that net's Accept has returned err. again means that the call must enter
// again: the gate has ended the calls inside since this call entered, so the deadline that
// has passed may be that of the gate. A call can leave late, when the gate is already open
// again.
func (g *gate) Leave(epoch uint64, err error) (again bool) {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	again = g.Epoch != epoch && errors.Is(err, os.ErrDeadlineExceeded)
	switch {
	case err == nil:
		g.Accepted++
	case !again:
		g.failed++
	}
	g.Inside--
	if g.shut {
		g.moved.Broadcast()
	}
	return again
}

// settled reports whether Accept has been called again for each connection that it
// returned. One call after the last connection is not enough: with several loops, one
// may call Accept while another is still busy with its connection. A new loop cannot be
// told apart from an old loop that calls again.
//
// settled ends all calls inside, so that none of them holds a connection. It waits for
// at most d.
func (g *gate) settled(ln *net.TCPListener, d time.Duration) bool {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	for g.shut { // another drain has shut the gate
		g.moved.Wait()
	}
	if g.Accepted > 0 {
		return false
	}
	if g.Inside > 0 {
		g.sendOut(ln, d, func() {})
	}
	return g.Accepted == 0 && g.Inside == 0
}

// sendOut ends the calls inside with a deadline in the past, and then shuts the gate until f
// has returned. A blocking socket ignores deadlines, so the wait is bounded. The Fd method of
// a copy makes it blocking, and os/exec calls that method. If calls are still inside then,
// the gate is open while f runs. The caller holds mu, which f runs without.
func (g *gate) sendOut(ln *net.TCPListener, d time.Duration, f func()) {
	tooLong := false
	defer time.AfterFunc(d, func() {
		g.Mu.Lock()
		defer g.Mu.Unlock()
		tooLong = true
		g.moved.Broadcast()
	}).Stop()
	g.shut = true
	g.Epoch++
	ln.SetDeadline(time.Unix(1, 0)) // fails on a closed listener, whose calls return anyway
	for g.Inside > 0 && !tooLong {
		g.moved.Wait()
	}
	if g.Inside == 0 {
		g.Mu.Unlock()
		f()
		g.Mu.Lock()
	} else {
		defer func() {
			g.Mu.Unlock()
			f()
			g.Mu.Lock()
		}()
	}
	ln.SetDeadline(g.deadline)
	g.shut = false
	g.moved.Broadcast()
}

// Unreturned returns the number of connections that Accept returned to a loop that has
// not called it again.
func (g *gate) Unreturned() int {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	return g.Accepted
}

// SetDeadline sets the deadline that the caller of the library has asked for.
func (g *gate) SetDeadline(ln *net.TCPListener, t time.Time) error {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	for g.shut { // sendOut would overwrite t
		g.moved.Wait()
	}
	g.deadline = t
	return ln.SetDeadline(t)
}
