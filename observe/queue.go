package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

// A Queue is a listener whose accept queue is read. It comes from [Set.Add] or
// [Set.AddShards]. All methods may be called concurrently.
type Queue struct {
	name     string
	set      *Set
	sockets  []*socket
	waiting  func(context.Context) ([]acceptq.Waiting, error) // nil if the listener cannot list them
	exporter Exporter                                         // nil without Config.Export

	unknownWaits atomic.Int64 // connections whose wait Observe could not read

	mu   sync.Mutex // held while the sockets are read, so that drops are added up in order
	peak peak       // of the sum of the sockets

	listing    sync.Mutex // allows one listing of the kernel's table at a time
	oldest     answer[time.Duration]
	handshakes answer[int]
}

// Name returns the name that was passed to Add.
func (q *Queue) Name() string { return q.name }

// Len returns the number of sockets: 1, or the number of shards.
func (q *Queue) Len() int { return len(q.sockets) }

// Exporter returns what [Config].Export has returned for q. It is nil without Export.
func (q *Queue) Exporter() Exporter { return q.exporter }

// Remove removes q from its Set. The listener stays open, and its name can be used again.
// A closed listener is removed without this call.
func (q *Queue) Remove() { q.set.remove(q) }

func (q *Queue) removed() {
	if q.exporter != nil {
		q.exporter.Remove()
	}
}

// Observe passes the time that c waited in the accept queue to the [Exporter]. Call it once
// for each connection, when Accept has returned it and before anything is sent on it.
//
// c may also be a wrapper in which [acceptq.QueueTime] finds the TCP connection, such as a
// [*crypto/tls.Conn]. If the wait of c cannot be read, Observe counts c in
// [Reading].UnknownWaits. The connections of a PROXY protocol listener are an example. Then
// use [Queue.Listener] directly around the TCP listener.
func (q *Queue) Observe(c net.Conn) {
	if q.exporter == nil {
		return
	}
	wait, err := acceptq.QueueTime(c)
	if err != nil {
		q.unknownWaits.Add(1)
		return
	}
	q.exporter.Observe(wait)
}

// waits is whether the system reports how long a connection waited.
const waits = runtime.GOOS == "linux" || runtime.GOOS == "android"

// ConnContext calls Observe and returns ctx. It is meant for the field of that name in
// [net/http.Server]. Observe says what c may be. If the listener of the server hides the TCP
// connections, leave that field empty and use [Queue.Listener].
func (q *Queue) ConnContext(ctx context.Context, c net.Conn) context.Context {
	q.Observe(c)
	return ctx
}

// Listener returns a listener that calls Observe for each connection that it accepts from
// l. It is meant for servers that have no hook for a new connection.
//
// Put it directly around the TCP listener, and other listeners around it. So it gets the TCP
// connections themselves:
//
//	server.Serve(netutil.LimitListener(queue.Listener(ln), 1000))
//
// Do not also pass these connections to Observe or ConnContext, which would count them twice.
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

// Numbers are the numbers of one queue, or the sums of several, at one moment. -1 means
// unknown. A sum with an unknown part is unknown.
type Numbers struct {
	// Stats is the reading of the kernel. Its Drops do not wrap at 32 bits.
	Stats acceptq.Stats
	// Requested is the backlog that the program asked for, see [acceptq.Backlog]. It is
	// read when the limit changes, and at least once in two minutes.
	Requested int
	// Accepted is the number of connections that Accept has returned, see
	// [acceptq.Listener.Accepted]. It is unknown for a listener of another type.
	Accepted int64
	// Peak is the largest length of the queue in the last window, as far as it was read.
	Peak int
	// FullestPeak is the largest share of a queue in the last window: 1 is a queue that was
	// full. Of several queues it is that of the fullest, because it refuses clients.
	FullestPeak float64
}

// A Reading is what is known of a Queue at one moment.
type Reading struct {
	// Numbers are those of the socket, or the sums of all shards.
	Numbers
	// Shards has the numbers of each socket, in the order of [acceptq.Shards.All].
	Shards []Numbers
	// OldestWait is how long the oldest waiting connection has waited. It is 0 if none
	// waits, and -1 without [Config].OldestWait or if the system does not report it. If a
	// SO_REUSEPORT group has other members, the connection may be in one of their queues.
	OldestWait time.Duration
	// Handshakes is the number of in-flight handshakes, see [acceptq.Listener.Handshakes].
	// It is -1 without [Config].Handshakes or if the system does not report it.
	Handshakes int
	// UnknownWaits is the number of connections whose wait [Queue.Observe] could not read. It
	// is -1 on systems other than Linux, which report no wait, and without [Config].Export.
	UnknownWaits int64
}

// MarshalJSON writes the numbers with lower-case names, without those of the single shards.
// The wait is in seconds. An unknown number is null.
func (r Reading) MarshalJSON() ([]byte, error) {
	known := func(n float64) *float64 {
		if n == unknown {
			return nil
		}
		return &n
	}
	wait := r.OldestWait.Seconds()
	if r.OldestWait == unknown {
		wait = unknown
	}
	return json.Marshal(struct {
		Stats        acceptq.Stats `json:"stats"`
		Requested    *float64      `json:"requested"`
		Accepted     *float64      `json:"accepted"`
		Peak         *float64      `json:"peak"`
		FullestPeak  *float64      `json:"fullestPeak"`
		OldestWait   *float64      `json:"oldestWaitSeconds"`
		Handshakes   *float64      `json:"handshakes"`
		UnknownWaits *float64      `json:"unknownWaits"`
	}{
		r.Stats, known(float64(r.Requested)), known(float64(r.Accepted)), known(float64(r.Peak)),
		known(r.FullestPeak), known(wait), known(float64(r.Handshakes)), known(float64(r.UnknownWaits)),
	})
}

// Read reads the sockets of q and stores the numbers in r, whose memory it uses again. If
// the listener is closed, Read removes q, and the error matches [net.ErrClosed].
func (q *Queue) Read(r *Reading) error {
	if !q.look(r) {
		q.Remove()
		return fmt.Errorf("acceptq: listener %q: %w", q.name, net.ErrClosed)
	}
	r.OldestWait, r.Handshakes, r.UnknownWaits = unknown, unknown, unknown
	if waits && q.exporter != nil {
		r.UnknownWaits = q.unknownWaits.Load()
	}
	c := &q.set.config
	if c.OldestWait > 0 && q.waiting != nil {
		r.OldestWait = q.oldestWait(r)
	}
	if l, ok := q.sockets[0].conn.(handshaker); ok && c.Handshakes > 0 {
		r.Handshakes = ask(&q.listing, &q.handshakes, c.Handshakes, l.Handshakes)
	}
	return nil
}

type handshaker interface {
	Handshakes(ctx context.Context) (int, error)
}

// oldestWait returns how long the oldest connection has waited. With an empty queue it does
// not ask the kernel.
func (q *Queue) oldestWait(r *Reading) time.Duration {
	if r.Stats.Queued == 0 {
		return 0
	}
	return ask(&q.listing, &q.oldest, q.set.config.OldestWait, func(ctx context.Context) (time.Duration, error) {
		waiting, err := q.waiting(ctx)
		if err != nil || len(waiting) == 0 { // the kernel does not list a connection that its client has reset
			return unknown, err
		}
		return waiting[0].Waited, nil
	})
}

// An answer is the last answer of the kernel to an expensive question.
type answer[T any] struct {
	mu    sync.Mutex
	asked bool
	at    time.Time
	value T
}

// patience is how long a reading waits for the kernel to walk its table.
const patience = 2 * time.Second

// ask returns the last answer. It asks again if that is older than every, unless another
// call is asking.
func ask[T time.Duration | int](one *sync.Mutex, a *answer[T], every time.Duration, question func(context.Context) (T, error)) T {
	a.mu.Lock()
	fresh := a.asked && time.Since(a.at) < every
	a.mu.Unlock()
	if !fresh && one.TryLock() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		value, err := question(ctx)
		cancel()
		if err != nil {
			value = unknown
		}
		a.mu.Lock()
		a.asked, a.at, a.value = true, time.Now(), value
		a.mu.Unlock()
		one.Unlock()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.asked {
		return unknown
	}
	return a.value
}

// open reports whether all sockets are open.
func (q *Queue) open() bool {
	var r Reading
	return q.look(&r)
}

// look reads the sockets, without what is expensive. It returns false if one is closed.
func (q *Queue) look(r *Reading) (open bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Since(q.set.start)
	window := q.set.config.Window
	r.Shards = r.Shards[:0]
	for _, s := range q.sockets {
		stats, err := acceptq.ReadStats(s.conn)
		if errors.Is(err, net.ErrClosed) {
			return false
		}
		stats.Drops = s.drops.total(stats.Drops)
		n := Numbers{Stats: stats, Requested: s.requested(now, stats.Limit), Accepted: unknown, FullestPeak: unknown}
		if l, ok := s.conn.(interface{ Accepted() uint64 }); ok {
			n.Accepted = int64(l.Accepted())
		}
		n.Peak = s.peak.note(now, window, stats.Queued)
		if n.Peak != unknown && stats.Capacity > 0 {
			n.FullestPeak = float64(n.Peak) / float64(stats.Capacity)
		}
		r.Shards = append(r.Shards, n)
	}
	r.Numbers = r.Shards[0]
	if len(r.Shards) > 1 {
		r.Numbers = sum(r.Shards)
		r.Peak = q.peak.note(now, window, r.Stats.Queued)
	}
	return true
}

// sum returns the sums, without Peak: the shards do not have their peaks at the same time.
func sum(all []Numbers) (total Numbers) {
	total = all[0]
	total.Peak = unknown
	fullest, known := 0, true
	highest := -1.0
	for i, n := range all {
		part, ok := n.Stats.Utilization()
		known = known && ok
		if part > highest {
			fullest, highest = i, part
		}
		if i == 0 {
			continue
		}
		total.Stats.Queued = plus(total.Stats.Queued, n.Stats.Queued)
		total.Stats.Incomplete = plus(total.Stats.Incomplete, n.Stats.Incomplete)
		total.Stats.Limit = plus(total.Stats.Limit, n.Stats.Limit)
		total.Stats.Capacity = plus(total.Stats.Capacity, n.Stats.Capacity)
		total.Stats.Drops = plus(total.Stats.Drops, n.Stats.Drops)
		total.Requested = plus(total.Requested, n.Requested)
		total.Accepted = plus(total.Accepted, n.Accepted)
		total.FullestPeak = larger(total.FullestPeak, n.FullestPeak)
	}
	if known {
		total.Stats.Fullest = &all[fullest].Stats
	}
	return total
}

func plus[T int | int64](a, b T) T {
	if a == unknown || b == unknown {
		return unknown
	}
	return a + b
}

// A socket is one listening socket of a Queue.
type socket struct {
	conn  syscall.Conn
	drops unwrapped
	peak  peak
	asked struct {
		backlog, limit int
		until          time.Duration // since the start of the Set; 0 before the first reading
	}
}

// requested returns the backlog that the program asked for. [acceptq.Listener.Backlog] also
// reads the ceiling from a file, which costs more than all other readings. So it is called
// again only if the limit shows a call of SetBacklog, and rarely otherwise. The random time
// spreads the calls for many listeners.
func (s *socket) requested(now time.Duration, limit int) int {
	l, ok := s.conn.(interface{ Backlog() acceptq.Backlog })
	if !ok {
		return unknown
	}
	if s.asked.until <= now || s.asked.limit != limit {
		s.asked.backlog, s.asked.limit = l.Backlog().Requested, limit
		s.asked.until = now + time.Minute + rand.N(time.Minute)
	}
	return s.asked.backlog
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

// A peak remembers the largest number of the last window. Reading it changes nothing, so
// that several readers see the same peak.
type peak struct {
	parts [peakParts + 1]struct {
		epoch int64 // the number of the part since the start, plus 1
		max   int
	}
}

// peakParts is the number of parts of a window. A peak lasts for the window and a maximum
// of one part more.
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
func larger[T int | float64](a, b T) T {
	if a == unknown || b == unknown {
		return unknown
	}
	return max(a, b)
}
