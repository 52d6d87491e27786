package graceful

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A conn is what Serve or Run knows about a connection. The goroutines of the server
// change the atomic fields without a lock, and the stop looks at them.
type conn struct {
	net.Conn
	key     any // of conns.all
	state   atomic.Int32
	running atomic.Int32 // functions that serve the connection: handlers of requests
	since   atomic.Int64 // when it came to rest, if that was during the stop
	http2   atomic.Bool
	body    atomic.Bool  // the last request had a body
	leaving atomic.Bool  // net/http closes the connection after the answer
	closing atomic.Bool  // the stop closes the connection
	answers atomic.Int32 // Run: how often a Write came first or followed a Read

	// Only look uses these.
	noted    bool    // first is known, or cannot be
	first    traffic // when look first saw that the connection waits for its client
	answered bool    // look has seen the connection at rest
	arriving bool    // a part of the next request has arrived
}

// The states of a connection.
const (
	fresh   int32 = iota // before the first answer
	greeted              // HTTP/2 before the first request: a GOAWAY loses nothing
	busy                 // a request is being answered
	idle                 // at rest: kept alive until the next request
	gone                 // closed, or hijacked
)

func (c *conn) set(state int32) {
	if c.state.Load() != state {
		c.state.Store(state)
	}
}

// conns holds the connections of a server until they are closed and no handler of theirs
// runs. A handler may outlive its connection: it has hijacked the connection, or the client
// of an HTTP/2 stream has gone.
type conns struct {
	raw      bool         // of Run: the methods of the connections tell their state
	all      sync.Map     // *conn by net.Conn, or by itself if raw
	stopping atomic.Int64 // when the server began to turn its clients away; 0 before that
	cut      atomic.Int64 // connections that other code has closed under their handler
	mu       sync.Mutex   // held by look and close
}

// add adds a new connection.
func (cs *conns) add(nc net.Conn) *conn {
	c := &conn{Conn: nc}
	if c.key = nc; cs.raw {
		c.key = c
	}
	cs.all.Store(c.key, c)
	return c
}

// note handles a ConnState of net/http. HTTP/2 reports StateIdle right after the preface
// and before any request, so only a handler ends the state fresh.
func (cs *conns) note(nc net.Conn, state http.ConnState) {
	if state == http.StateNew || state == http.StateActive {
		return
	}
	v, ok := cs.all.Load(nc)
	if !ok {
		return
	}
	c := v.(*conn)
	switch state {
	case http.StateIdle:
		if s := c.state.Load(); s == fresh || s == greeted {
			c.set(greeted)
			return
		}
		cs.rest(c)
	case http.StateHijacked, http.StateClosed:
		cs.forget(c)
	}
}

// rest records that c came to rest.
func (cs *conns) rest(c *conn) {
	if cs.stopping.Load() != 0 {
		c.since.Store(now())
	}
	c.set(idle)
}

func (cs *conns) forget(c *conn) {
	c.state.Store(gone)
	if c.running.Load() == 0 {
		cs.all.Delete(c.key)
	}
}

// open returns the number of open connections.
func (n counts) open() int {
	return n.fresh + n.greeted + n.active + n.finishing + n.arriving + n.idle + n.rested
}

// begin records that a function begins to serve c. It ends with end. c is nil if the
// request did not come from the server.
func (cs *conns) begin(c *conn) *conn {
	if c != nil {
		c.running.Add(1)
		c.set(busy)
	}
	return c
}

func (cs *conns) end(c *conn) {
	if c == nil {
		return
	}
	if cs.stopping.Load() != 0 && !c.http2.Load() && c.state.Load() != gone && !c.closing.Load() && hasClosed(c.Conn) {
		cs.cut.Add(1)
	}
	if c.running.Add(-1) == 0 && c.state.Load() == gone {
		cs.all.Delete(c.key)
	}
}

// counts are the numbers of connections at one moment.
type counts struct {
	fresh     int // before the first answer
	greeted   int // HTTP/2, before the first request
	active    int // a function serves them
	finishing int // no function does, and they will be idle when net/http says so
	arriving  int // a part of the next request has arrived
	idle      int // at rest for less than the linger
	rested    int // at rest for the linger
}

// look counts the connections. During the stop it closes those of HTTP/1 that have been at
// rest for the linger. HTTP/2 has GOAWAY for that, which Shutdown sends.
func (cs *conns) look(linger time.Duration) (n counts) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	stopping := cs.stopping.Load()
	for _, v := range cs.all.Range {
		c := v.(*conn)
		if cs.raw && stopping != 0 && hasClosed(c.Conn) {
			cs.forget(c) // not with the method of the watched connection
			continue
		}
		state := c.state.Load()
		if state == idle || cs.raw && state == fresh && c.hasSent() {
			c.answered = true
		}
		if state == busy {
			c.arriving, c.noted = false, false
		} else if stopping != 0 && !c.noted {
			c.noted = true
			c.first, _ = trafficOf(c.Conn)
		}
		switch {
		case c.running.Load() > 0:
			n.active++
		case c.closing.Load() && state == idle:
			n.idle++
		case c.closing.Load() || state == gone:
		case cs.unanswered(c):
			n.fresh++
		case state == busy && (cs.raw || c.leaving.Load()):
			n.active++
		case state == busy:
			n.finishing++
		case state == fresh: // of Run
			n.rested++
		case state == greeted:
			n.greeted++
		case stopping == 0:
			n.idle++
		case c.arriving:
			n.arriving++
		default:
			cs.atRest(c, &n, now()-max(stopping, c.since.Load()) >= int64(linger))
		}
	}
	return n
}

// atRest handles a connection that is at rest during the stop.
func (cs *conns) atRest(c *conn, n *counts, long bool) {
	http1 := !cs.raw && !c.http2.Load()
	switch {
	case !long:
		n.idle++
	case !http1:
		n.rested++
	case c.hasMore(c.first):
		c.arriving = true
		n.arriving++
	default:
		c.closing.Store(true)
		n.idle++
		first := c.first
		go func() {
			if !c.hasMore(first) { // it may have come since
				c.Close()
				return
			}
			c.closing.Store(false)
		}()
	}
}

// unanswered reports whether the server has not answered c yet, or not for long enough: a
// server such as cmux writes for the first time before another one serves the connection.
func (cs *conns) unanswered(c *conn) bool {
	if !cs.raw {
		return c.state.Load() == fresh
	}
	return !c.answered && c.answers.Load() < 2
}

// silent reports whether c is new and its client has sent nothing, or whether it is an HTTP/2
// connection that has been at rest since the stop first saw it.
func (cs *conns) silent(c *conn) bool {
	state := c.state.Load()
	if state == fresh {
		return !c.owed()
	}
	t, known := trafficOf(c.Conn)
	return state == idle && c.http2.Load() && known && c.noted && !t.unread && t.received == c.first.received
}

// close closes the connections that which selects. It returns how many of them had sent
// something that was not answered, or may have.
func (cs *conns) close(which func(c *conn) bool) (cut int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, v := range cs.all.Range {
		c := v.(*conn)
		if c.state.Load() == gone || c.closing.Load() || !which(c) {
			continue
		}
		if c.owed() {
			cut++
		}
		c.closing.Store(true)
		go socketOf(c.Conn).Close() // tls.Conn.Close would send an alert, and may block
	}
	return cut
}

var started = time.Now()

// now returns the time since the start of the program. It is never 0.
func now() int64 { return int64(time.Since(started)) + 1 }

// traffic is what the kernel knows about the bytes of a connection.
type traffic struct {
	received uint64 // bytes; 0 if traffic is unknown
	sent     uint64
	unread   bool // the server has not read all that was received
	newer    bool // the last byte was received after the last byte was sent
}

// owed reports whether the client has sent something that the server has not answered, or
// may have. After a TLS handshake only what came during the stop tells that.
func (c *conn) owed() bool {
	t, known := trafficOf(c.Conn)
	if _, ok := c.Conn.(*tls.Conn); ok && c.noted && c.first.sent > 0 {
		return !known || t.unread || t.received > c.first.received
	}
	return !known || t.unread || t.received > 0 && (t.sent == 0 || t.newer)
}

// hasMore reports whether a part of the next request has arrived on a connection at rest.
// first is what had arrived when the stop first saw it.
// The kernel counts the time in milliseconds or coarser, so it also compares numbers of
// bytes. After a request with a body only they tell: net/http may read the rest of the
// body after the answer.
func (c *conn) hasMore(first traffic) bool {
	t, known := trafficOf(c.Conn)
	return known && (t.unread || t.received > first.received || t.newer && !c.body.Load())
}

// hasSent reports whether the server has sent something without the methods of the
// connection, as net.Buffers does.
func (c *conn) hasSent() bool {
	if _, ok := c.Conn.(syscall.Conn); !ok {
		return false // TLS sends in its handshake
	}
	t, known := trafficOf(c.Conn)
	return known && t.sent > 0
}

// socketOf returns the connection at the bottom of nc, as far as nc shows it.
func socketOf(nc net.Conn) net.Conn {
	for range depth {
		if _, ok := nc.(syscall.Conn); ok {
			break
		}
		inner := field[net.Conn](nc, "Conn")
		if c, ok := nc.(interface{ NetConn() net.Conn }); ok {
			inner = c.NetConn()
		}
		if inner == nil {
			break
		}
		nc = inner
	}
	return nc
}

// hasClosed reports whether this process has closed nc, as far as nc shows it.
func hasClosed(nc net.Conn) bool {
	c, ok := socketOf(nc).(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(uintptr) {})
	}
	return errors.Is(err, net.ErrClosed)
}
