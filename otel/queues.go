package acceptqotel

// This file is the same in the modules prom and otel, except for the package
// clause. A test of otel compares the two. They share no package, because a
// nested module must build with every later release of the root module.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
)

// unknown stands for a number that the system does not tell.
const unknown = -1

// A Queue is a listener whose accept queue is reported. It comes from Add or
// AddShards. All methods may be called concurrently.
type Queue struct {
	name    string
	set     *set
	sockets []*socket
	own     own

	mu   sync.Mutex // held while the sockets are read, so that drops are added up in order
	peak peak       // of the sum of the sockets
}

// Observe records how long c waited in the accept queue. Call it once for each
// connection, when Accept has returned it and before anything is sent on it.
//
// A type that has a NetConn method, such as [*crypto/tls.Conn], serves as well. Observe
// does nothing if the wait cannot be read, as on systems other than Linux; see
// [acceptq.QueueTime].
func (q *Queue) Observe(c net.Conn) {
	if wait, err := acceptq.QueueTime(c); err == nil {
		q.observe(wait)
	}
}

// ConnContext records how long c waited in the accept queue and returns ctx. It is
// meant for the field of that name in [net/http.Server].
func (q *Queue) ConnContext(ctx context.Context, c net.Conn) context.Context {
	q.Observe(c)
	return ctx
}

// Listener returns a listener that calls Observe for each connection that it
// accepts from l. It is meant for servers that have no hook for a new connection.
func (q *Queue) Listener(l net.Listener) net.Listener { return observed{l, q} }

type observed struct {
	net.Listener
	queue *Queue
}

func (o observed) Accept() (net.Conn, error) {
	c, err := o.Listener.Accept()
	if err == nil {
		o.queue.Observe(c)
	}
	return c, err
}

// Remove ends the report about q. The listener stays open, and its name can be used
// again. A closed listener is removed without this call.
func (q *Queue) Remove() { q.set.remove(q) }

// A socket is one listening socket of a Queue.
type socket struct {
	conn  syscall.Conn
	drops unwrapped
	peak  peak
}

// requested returns the backlog that the program asked for.
func (s *socket) requested() int {
	if l, ok := s.conn.(interface{ Backlog() acceptq.Backlog }); ok {
		return l.Backlog().Requested
	}
	return unknown
}

// A reading is what is known of one socket, or of all sockets of a Queue, at one moment.
type reading struct {
	acceptq.Stats // its Drops do not wrap
	peak          int
}

// read reads the sockets of q and appends a reading of each to buf. The sum is
// unknown where a part of it is. It returns false if a socket is closed.
func (q *Queue) read(buf []reading) (each []reading, sum reading, open bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Since(q.set.start)
	for i, s := range q.sockets {
		stats, err := acceptq.ReadStats(s.conn)
		if errors.Is(err, net.ErrClosed) {
			return buf, reading{}, false
		}
		stats.Drops = s.drops.total(stats.Drops)
		r := reading{stats, s.peak.note(now, q.set.window, stats.Queued)}
		buf = append(buf, r)
		if i == 0 {
			sum = r
			continue
		}
		sum.Queued = plus(sum.Queued, r.Queued)
		sum.Incomplete = plus(sum.Incomplete, r.Incomplete)
		sum.Limit = plus(sum.Limit, r.Limit)
		sum.Capacity = plus(sum.Capacity, r.Capacity)
		sum.Drops = plus(sum.Drops, r.Drops)
	}
	sum.peak = q.peak.note(now, q.set.window, sum.Queued)
	return buf, sum, true
}

func plus[T int | int64](a, b T) T {
	if a == unknown || b == unknown {
		return unknown
	}
	return a + b
}

// requested returns the sum of what the sockets of q asked for.
func (q *Queue) requested() (sum int) {
	for _, s := range q.sockets {
		sum = plus(sum, s.requested())
	}
	return sum
}

// unwrapped adds up a 32-bit counter that wraps.
type unwrapped struct {
	seen bool
	last uint32
	sum  int64
}

func (u *unwrapped) total(raw int64) int64 {
	if raw == unknown {
		return unknown
	}
	if u.seen {
		u.sum += int64(uint32(raw) - u.last)
	} else {
		u.sum, u.seen = raw, true
	}
	u.last = uint32(raw)
	return u.sum
}

// A peak remembers the largest number of the last window. Reading it changes
// nothing, so that several scrapers see the same peak.
type peak struct {
	parts [peakParts + 1]struct {
		epoch int64 // the number of the part since the start, plus 1
		max   int
	}
}

// peakParts is the number of parts of a window. A peak lasts for the window and a
// maximum of one part more.
const peakParts = 16

// note takes in n at the time now and returns the largest number of the last window. It is
// unknown if one of the numbers is.
func (p *peak) note(now, window time.Duration, n int) int {
	epoch := int64(now/max(window/peakParts, 1)) + 1
	part := &p.parts[epoch%int64(len(p.parts))]
	if part.epoch != epoch {
		part.epoch, part.max = epoch, n
	}
	part.max = larger(part.max, n)
	for _, old := range p.parts {
		if old.epoch > epoch-int64(len(p.parts)) && old.epoch > 0 {
			n = larger(n, old.max)
		}
	}
	return n
}

// larger returns the larger number. It is unknown if one of them is: DragonFly does not
// tell the length of a long queue, so an unknown one can be the longest.
func larger(a, b int) int {
	if a == unknown || b == unknown {
		return unknown
	}
	return max(a, b)
}

// A set is the queues that are reported, by name.
type set struct {
	interval time.Duration // of the sampler; 0 if there is none
	window   time.Duration // of peaks
	start    time.Time
	perShard bool
	equip    func(*Queue) own // makes what the metrics library needs for a new Queue

	mu     sync.Mutex
	queues map[string]*Queue
	list   []*Queue      // sorted by name; replaced and never changed, so that a reader may keep it
	stop   chan struct{} // ends the sampler; nil while none runs
}

func newSet(equip func(*Queue) own) *set {
	return &set{window: time.Minute, start: time.Now(), equip: equip, queues: make(map[string]*Queue)}
}

// sampling sets the sampler, with the defaults for numbers that are not positive.
func (s *set) sampling(interval, window time.Duration) {
	s.interval, s.window = 10*time.Millisecond, time.Minute
	if interval > 0 {
		s.interval = interval
	}
	if window > 0 {
		s.window = window
	}
}

// Add reports the accept queue of the listener l under a name, which becomes the label
// listener of its metrics. l is an [*acceptq.Listener] or any other listening TCP socket,
// such as a [*net.TCPListener].
//
// When l is closed it disappears from the metrics, and the name can be used again.
//
// It is an error if the name is empty, is not valid UTF-8 or is in use. The error
// matches [syscall.EINVAL] if l is not a listening TCP socket, and [net.ErrClosed] if
// it is closed. On systems where the queue cannot be read Add succeeds, and the
// metrics are absent.
func (s *set) Add(name string, l syscall.Conn) (*Queue, error) {
	return s.add(name, l)
}

// AddShards is Add for [acceptq.Shards]. The metrics are the sums of all shards, or
// those of each one with [WithShardLabel].
func (s *set) AddShards(name string, shards *acceptq.Shards) (*Queue, error) {
	var conns []syscall.Conn
	if shards != nil {
		for l := range shards.All() {
			conns = append(conns, l)
		}
	}
	return s.add(name, conns...)
}

func (s *set) add(name string, conns ...syscall.Conn) (*Queue, error) {
	fail := func(err error) (*Queue, error) {
		return nil, fmt.Errorf("acceptq: report listener %q: %w", name, err)
	}
	switch {
	case name == "":
		return fail(errors.New("the name is empty"))
	case !utf8.ValidString(name):
		return fail(errors.New("the name is not valid UTF-8"))
	case len(conns) == 0:
		return fail(fmt.Errorf("no shards: %w", syscall.EINVAL))
	}
	q := &Queue{name: name, set: s}
	for _, c := range conns {
		if _, err := acceptq.ReadStats(c); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fail(err)
		}
		q.sockets = append(q.sockets, &socket{conn: c})
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.queues[name]; old != nil {
		if _, _, open := old.read(nil); open {
			return fail(errors.New("the name is in use"))
		}
		old.own.release()
	}
	q.own = s.equip(q)
	s.queues[name] = q
	s.changed()
	return q, nil
}

func (s *set) remove(q *Queue) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues[q.name] == q {
		delete(s.queues, q.name)
		q.own.release()
		s.changed()
	}
}

// all returns the queues, sorted by name.
func (s *set) all() []*Queue {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list
}

// changed makes the list anew, and starts or stops the sampler. s.mu is held.
func (s *set) changed() {
	s.list = make([]*Queue, 0, len(s.queues))
	for _, q := range s.queues {
		s.list = append(s.list, q)
	}
	slices.SortFunc(s.list, func(a, b *Queue) int { return strings.Compare(a.name, b.name) })
	switch {
	case len(s.list) == 0 && s.stop != nil:
		close(s.stop)
		s.stop = nil
	case len(s.list) > 0 && s.stop == nil && s.interval > 0:
		s.stop = make(chan struct{})
		go s.sample(s.stop)
	}
}

// sample reads all queues at each interval until stop is closed.
func (s *set) sample(stop <-chan struct{}) {
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	var buf []reading
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		for _, q := range s.all() {
			each, _, open := q.read(buf[:0])
			buf = each
			if !open {
				s.remove(q)
			}
		}
	}
}
