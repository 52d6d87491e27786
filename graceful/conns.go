package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/unwrap"
)

// A conn is what Serve or Run knows about a connection. The goroutines of the server
// change the atomic fields without a lock, and the stop looks at them.
type conn struct {
	net.Conn
	conns   *conns
	word    atomic.Int64 // the state, one of the first six, and the running functions
	http2   atomic.Bool
	body    atomic.Bool  // the last request had a body
	closing atomic.Bool  // the stop closes the connection
	writes  atomic.Int32 // of Run

	// Only the stop uses these, which holds conns.mu.
	pause    *pause
	answered bool // the stop has seen the connection at rest
}

// A pause is what the stop knew when it first saw that a connection waits for its client.
type pause struct {
	traffic
	since  time.Time
	writes int32
}

// The states of a connection. The server reports the first six, the stop tells the others.
const (
	fresh     int64 = iota // before the first answer
	greeted                // HTTP/2 before the first request: a GOAWAY loses nothing
	active                 // a request is being answered, or its answer is being sent
	idle                   // at rest for less than the linger
	arriving               // a part of the next request has arrived
	gone                   // closed, or hijacked
	finishing              // no function serves it, and it will be idle when net/http says so
	rested                 // at rest for the linger
	states
)

const (
	stateMask = 1<<8 - 1 // of conn.word
	function  = 1 << 8   // of conn.word: one function runs
)

// counts are the numbers of connections in each state at one moment.
type counts [states]int

// in returns the number of connections that are in one of the states.
func (n counts) in(states ...int64) (sum int) {
	for _, state := range states {
		sum += n[state]
	}
	return sum
}

// open returns the number of open connections.
func (n counts) open() int {
	return n.in(fresh, active, idle, arriving, greeted, finishing, rested)
}

// conns holds the connections of a server until they are closed and no handler of theirs
// runs. A handler may outlive its connection: it has hijacked the connection, or the client
// of an HTTP/2 stream has gone.
type conns struct {
	raw      bool         // of Run: the methods of the connections tell their state
	all      sync.Map     // *conn by net.Conn
	stopping atomic.Bool  // answers close their connections
	cut      atomic.Int64 // connections that other code has closed under their handler
	mu       sync.Mutex   // held by the stop
}

// add adds a new connection.
func (cs *conns) add(nc net.Conn) *conn {
	c := &conn{Conn: nc, conns: cs}
	cs.all.Store(nc, c)
	return c
}

// note handles a ConnState of net/http. HTTP/2 reports StateIdle right after the preface
// and before any request.
func (cs *conns) note(nc net.Conn, state http.ConnState) {
	if state == http.StateNew || state == http.StateActive {
		return
	}
	v, ok := cs.all.Load(nc)
	if !ok {
		return
	}
	switch c := v.(*conn); {
	case state != http.StateIdle:
		c.set(gone)
	case c.state() == fresh:
		c.http2.Store(true)
		c.set(greeted)
	default:
		c.set(idle)
	}
}

// state returns what the server has reported. running returns how many functions serve the
// connection: handlers of requests.
func (c *conn) state() int64   { return c.word.Load() & stateMask }
func (c *conn) running() int64 { return c.word.Load() / function }

// set changes the state, unless the connection is gone.
func (c *conn) set(state int64) { c.change(state, 0) }

// change changes the state, unless the connection is gone, and the number of running functions.
// Both are one word, so the last of several concurrent changes sees that the connection is gone
// and that no function runs, and removes it. A function that begins late puts it back, and does
// so before it ends, which is such a change.
func (c *conn) change(state, functions int64) {
	for {
		old := c.word.Load()
		next := old + functions*function
		if old&stateMask != gone {
			next += state - old&stateMask
		}
		if c.word.CompareAndSwap(old, next) {
			if next == gone {
				c.conns.all.Delete(c.Conn)
			}
			return
		}
	}
}

// begin records that a function begins to serve c. It ends with end. The connection of a stream
// of HTTP/2 may be gone already. begin writes before it reads: the goroutine of c may have moved
// to another processor, which then gets the memory of c in one step.
func (c *conn) begin() {
	if c.word.Add(function) == gone+function {
		c.conns.all.Store(c.Conn, c)
	}
}

// end takes the context of the request. If that has ended, the client may have reset the
// stream before begin, and then net/http does not report again that the connection rests.
func (c *conn) end(ctx context.Context) {
	if c.conns.stopping.Load() && !c.http2.Load() && c.state() != gone && !c.closing.Load() && hasClosed(c.Conn) {
		c.conns.cut.Add(1)
	}
	if c.http2.Load() && ctx.Err() != nil {
		c.change(idle, -1)
	} else {
		c.change(active, -1)
	}
}

// look counts the connections. During the stop it closes those of HTTP/1 that have been at
// rest for the linger. HTTP/2 has GOAWAY for that, which Shutdown sends.
func (cs *conns) look(linger time.Duration) (n counts) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.all.Range {
		n[c.(*conn).look(linger)]++
	}
	return n
}

// look returns the state of c.
func (c *conn) look(linger time.Duration) int64 {
	state, running, stopping := c.state(), c.running() > 0, c.conns.stopping.Load()
	if writes := c.writes.Load(); !stopping || running || state == active {
		c.pause = nil
	} else if c.pause == nil || c.pause.writes != writes {
		t, _ := trafficOf(c.Conn)
		c.pause = &pause{t, time.Now(), writes}
	}
	switch {
	case c.conns.raw:
		return c.lookOfRun(state, linger)
	case running:
		return active
	case c.closing.Load() && state != idle:
		return gone
	case state == active:
		return finishing
	case state == idle && stopping && !c.closing.Load() && time.Since(c.pause.since) >= linger:
		return c.rested()
	}
	return state
}

// rested closes a connection that has been at rest for the linger, and returns its state. The
// goroutine may start late, so it asks the kernel first. A request that comes during the stop
// ends its connection, so c does not rest again.
func (c *conn) rested() int64 {
	if c.http2.Load() {
		return rested
	}
	c.closing.Store(true)
	first := c.pause.traffic
	go func() {
		if !c.hasMore(first) {
			c.Close()
			return
		}
		c.word.CompareAndSwap(idle, arriving)
		c.closing.Store(false)
	}()
	return idle
}

// silent reports whether c is new and its client has sent nothing, or whether it is an HTTP/2
// connection that has been at rest since the stop first saw it.
func (c *conn) silent() bool {
	word := c.word.Load() // no function runs if it is only a state
	if word == fresh {
		return !c.owed()
	}
	t, known := trafficOf(c.Conn)
	return word == idle && c.http2.Load() && known && c.pause != nil && !t.unread && t.received == c.pause.received
}

// isIn returns a function for close. It selects connections that no function serves.
func isIn(state int64) func(*conn) bool { return func(c *conn) bool { return c.word.Load() == state } }

// close closes the connections that which selects. It returns how many of them had sent
// something that was not answered, or may have.
func (cs *conns) close(which func(c *conn) bool) (cut int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, v := range cs.all.Range {
		c := v.(*conn)
		if c.state() == gone || c.closing.Load() || !which(c) {
			continue
		}
		if c.owed() {
			cut++
		}
		c.closing.Store(true)
		go unwrap.Conn(c.Conn).Close() // tls.Conn.Close would send an alert, and may block
	}
	return cut
}

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
	if _, ok := c.Conn.(*tls.Conn); ok && c.pause != nil && c.pause.sent > 0 {
		return !known || t.unread || t.received > c.pause.received
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

// hasClosed reports whether this process has closed nc, as far as nc shows it.
func hasClosed(nc net.Conn) bool {
	return errors.Is(control(unwrap.Conn(nc), func(uintptr) {}), net.ErrClosed)
}

// control calls f with the descriptor of v, if v has one.
func control(v any, f func(fd uintptr)) error {
	c, ok := v.(syscall.Conn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(f)
}
