package graceful

import (
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"
)

// A conn holds the state of a connection of the server.
type conn struct {
	state     connState
	greeted   bool // HTTP/2 and idle before any request: a GOAWAY loses nothing
	handlers  int  // handlers that have not returned
	inside    bool // HTTP/1: the goroutine of the connection is in a handler
	hijacked  bool
	forgotten bool // closed or hijacked
}

type connState int

const (
	fresh  connState = iota // no request has reached the handler
	active                  // a request is being answered
	idle                    // kept alive
)

// conns tracks the connections of a server until they end. It uses the ConnContext, the
// ConnState and the Handler of the server.
type conns struct {
	mu       sync.Mutex
	all      map[net.Conn]*conn
	inState  [3]int        // how many are in each state
	greeted  int           // how many of the fresh ones are greeted
	inside   int           // how many are inside
	hijacked int           // handlers that have hijacked a connection and not returned
	lastIdle time.Time     // when a connection last became idle
	loops    int           // loops of the server that call Accept
	noLoops  chan struct{} // closed when all loops have ended
	changed  chan struct{} // holds a token when something has changed
	atEnd    func()        // called once with mu held, when no goroutine of net/http uses the server
}

func (cs *conns) signal() {
	select {
	case cs.changed <- struct{}{}:
	default:
	}
}

// add adds a new connection.
func (cs *conns) add(nc net.Conn) *conn {
	c := new(conn)
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.all[nc] = c
	cs.inState[fresh]++
	return c
}

func (cs *conns) set(c *conn, state connState) {
	if c.state == fresh && state != fresh && c.greeted {
		cs.greeted--
	}
	cs.inState[c.state]--
	cs.inState[state]++
	c.state = state
}

// note handles a ConnState of net/http. HTTP/2 reports StateIdle right after the preface
// and before any request. So only the handler ends the state fresh.
func (cs *conns) note(nc net.Conn, state http.ConnState) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.all[nc]
	if c == nil {
		return
	}
	switch state {
	case http.StateActive:
		if c.state == idle {
			cs.set(c, active)
		}
	case http.StateIdle:
		switch {
		case c.state != fresh:
			cs.set(c, idle)
			cs.lastIdle = time.Now()
		case !c.greeted:
			c.greeted = true
			cs.greeted++
		}
	case http.StateHijacked:
		c.hijacked = true
		cs.hijacked += c.handlers
		cs.forget(nc, c)
	case http.StateClosed:
		cs.forget(nc, c)
	}
	cs.signal()
}

func (cs *conns) forget(nc net.Conn, c *conn) {
	delete(cs.all, nc)
	cs.inState[c.state]--
	if c.state == fresh && c.greeted {
		cs.greeted--
	}
	cs.setInside(c, false)
	c.forgotten = true
	cs.checkEnd()
}

func (cs *conns) setInside(c *conn, inside bool) {
	if c.inside != inside && !c.forgotten {
		c.inside = inside
		if inside {
			cs.inside++
		} else {
			cs.inside--
		}
	}
}

// begin records that a handler begins to answer a request on c.
func (cs *conns) begin(c *conn, http1 bool) {
	if c == nil {
		return // the request did not come from the server
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.handlers++
	if c.state != active && !c.forgotten {
		cs.set(c, active)
	}
	cs.setInside(c, http1)
	cs.signal()
}

func (cs *conns) end(c *conn) {
	if c == nil {
		return
	}
	// A handler may return after restore has written the fields of the server. The lock
	// makes these writes visible to its goroutine.
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.handlers--
	if c.hijacked {
		cs.hijacked--
	}
	if c.handlers == 0 {
		cs.setInside(c, false)
	}
	cs.signal()
}

// loopEnded records that a loop of the server has returned.
func (cs *conns) loopEnded() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.loops--; cs.loops == 0 {
		close(cs.noLoops)
		cs.checkEnd()
	}
	cs.signal()
}

// checkEnd calls atEnd when no goroutine of net/http can read a field of the server
// anymore. Goroutines in a handler are an exception, see end.
func (cs *conns) checkEnd() {
	if cs.atEnd != nil && cs.loops == 0 && len(cs.all) == cs.inside {
		cs.atEnd()
		cs.atEnd = nil
	}
}

// whenEnded calls f when checkEnd finds no connection. That may be at once.
func (cs *conns) whenEnded(f func()) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.atEnd = f
	cs.checkEnd()
}

// counts are the numbers of connections at one moment.
type counts struct {
	fresh, active, idle int
}

func (cs *conns) count() counts {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return counts{
		fresh:  cs.inState[fresh] - cs.greeted,
		active: cs.inState[active] + cs.hijacked,
		idle:   cs.inState[idle] + cs.greeted,
	}
}

// closeFresh closes the connections on which no request has arrived, and returns their
// number. Shutdown would wait for them and then drop their request.
func (cs *conns) closeFresh() int {
	return cs.close(func(c *conn) bool { return c.state == fresh && !c.greeted })
}

func (cs *conns) closeAll() {
	cs.close(func(*conn) bool { return true })
}

func (cs *conns) close(which func(*conn) bool) int {
	cs.mu.Lock()
	var late []net.Conn
	for nc, c := range cs.all {
		if which(c) {
			late = append(late, nc)
		}
	}
	cs.mu.Unlock()
	for _, nc := range late {
		if c, ok := nc.(*tls.Conn); ok {
			nc = c.NetConn() // tls.Conn.Close would send an alert, and may block
		}
		nc.Close()
	}
	return len(late)
}

// rested returns how long idle connections must still be left open. The time ends linger
// after begin, or linger after a connection last became idle, whichever is later. rested
// returns 0 if no connection is idle.
func (cs *conns) rested(begin time.Time, linger time.Duration) time.Duration {
	if cs.inState[idle] == 0 {
		return 0
	}
	if cs.lastIdle.After(begin) {
		begin = cs.lastIdle
	}
	return max(0, time.Until(begin.Add(linger)))
}
