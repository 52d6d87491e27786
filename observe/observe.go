// Package observe keeps readings of accept queues for programs that report them. The
// modules prom and otel and the examples use it; a program that reports to another system
// can do the same:
//
//	queues := observe.NewSet(observe.Config{Interval: 10 * time.Millisecond})
//	api, err := queues.Add("api", ln)
//	expvar.Publish("acceptQueues", queues)
//	var r observe.Reading
//	if api.Read(&r) == nil {
//		log.Print(r.Stats, ", at most ", r.Peak, " in the last minute")
//	}
//
// A number that the system does not report is -1.
package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
)

// unknown stands for a number that the system does not report.
const unknown = -1

// Config says what a [Set] reads. The zero Config is valid: each reading asks the kernel
// once for each socket, and nothing runs in the background.
type Config struct {
	// Interval is the time between two readings of the sampler, a goroutine that reads all
	// queues while the Set has some. It makes bursts visible that no Read meets. With 0
	// there is no sampler.
	Interval time.Duration
	// Window is how long a peak is remembered. 0 or less is one minute.
	Window time.Duration
	// OldestWait makes Read ask for the age of the oldest waiting connection, with
	// [acceptq.Listener.Waiting]. It asks only if a connection waits, and at most once in
	// this time. With 0 it does not ask.
	OldestWait time.Duration
	// Handshakes makes Read ask for the in-flight handshakes, with
	// [acceptq.Listener.Handshakes], at most once in this time. With 0 it does not ask.
	Handshakes time.Duration
	// Export, if it is not nil, is called for each Queue that is added. It must not call
	// methods of the Set.
	Export func(*Queue) Exporter
}

// An Exporter reports one [Queue] to another system.
type Exporter interface {
	// Observe is called with the wait of each connection that [Queue.Observe] gets.
	Observe(wait time.Duration)
	// Remove is called once, when the Queue has left the Set. It must not call methods of
	// the Set.
	Remove()
}

// A Set holds accept queues by name. It comes from [NewSet]. All methods may be called
// concurrently.
type Set struct {
	config Config
	start  time.Time

	mu     sync.Mutex
	closed bool
	queues map[string]*Queue
	list   []*Queue      // sorted by name; replaced and never changed, so that a reader may keep it
	stop   chan struct{} // ends the sampler; nil while none runs
}

// NewSet returns a Set without queues.
func NewSet(c Config) *Set {
	if c.Window <= 0 {
		c.Window = time.Minute
	}
	return &Set{config: c, start: time.Now(), queues: make(map[string]*Queue)}
}

// Window returns how long a peak is remembered.
func (s *Set) Window() time.Duration { return s.config.Window }

// Add adds the accept queue of the listener l under a name. l is an [*acceptq.Listener] or
// any other listening TCP socket, such as a [*net.TCPListener].
//
// When l is closed, the next reading removes it, and the name can be used again.
//
// It is an error if the name is empty, is not valid UTF-8 or is in use. The error matches
// [syscall.EINVAL] if l is not a listening TCP socket, [net.ErrClosed] if it is closed, and
// [os.ErrClosed] after Close. On systems where the queue cannot be read Add succeeds, and
// the numbers are unknown.
func (s *Set) Add(name string, l syscall.Conn) (*Queue, error) {
	q := &Queue{name: name, set: s}
	if w, ok := l.(waiter); ok {
		q.waiting = w.Waiting
	}
	return s.add(q, l)
}

// AddShards is like Add for [acceptq.Shards]. The numbers of a [Reading] are sums over all
// shards.
func (s *Set) AddShards(name string, shards *acceptq.Shards) (*Queue, error) {
	q := &Queue{name: name, set: s}
	var conns []syscall.Conn
	if shards != nil {
		q.waiting = shards.Waiting
		for l := range shards.All() {
			conns = append(conns, l)
		}
	}
	return s.add(q, conns...)
}

// waiter is an [*acceptq.Listener], or a type that embeds one.
type waiter interface {
	Waiting(ctx context.Context) ([]acceptq.Waiting, error)
}

func (s *Set) add(q *Queue, conns ...syscall.Conn) (*Queue, error) {
	fail := func(err error) (*Queue, error) {
		return nil, fmt.Errorf("acceptq: observe listener %q: %w", q.name, err)
	}
	switch {
	case q.name == "":
		return fail(errors.New("the name is empty"))
	case !utf8.ValidString(q.name):
		return fail(errors.New("the name is not valid UTF-8"))
	case len(conns) == 0:
		return fail(fmt.Errorf("no shards: %w", syscall.EINVAL))
	}
	for _, c := range conns {
		if _, err := acceptq.ReadStats(c); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fail(err)
		}
		q.sockets = append(q.sockets, &socket{conn: c})
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fail(fmt.Errorf("the reports have ended: %w", os.ErrClosed))
	}
	if old := s.queues[q.name]; old != nil {
		if old.open() {
			return fail(errors.New("the name is in use"))
		}
		old.removed()
	}
	if s.config.Export != nil {
		q.exporter = s.config.Export(q)
	}
	s.queues[q.name] = q
	s.changed()
	return q, nil
}

func (s *Set) remove(q *Queue) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues[q.name] == q {
		delete(s.queues, q.name)
		q.removed()
		s.changed()
	}
}

// Queues returns the queues, sorted by name. The caller must not change the slice.
func (s *Set) Queues() []*Queue {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list
}

// Close removes all queues and ends the sampler. The listeners stay open. Afterwards Add
// returns an error. It returns nil.
func (s *Set) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, q := range s.queues {
		q.removed()
	}
	clear(s.queues)
	s.changed()
	return nil
}

// String returns a reading of each queue as a JSON object with the names as keys. So a Set
// is an [expvar.Var].
func (s *Set) String() string {
	all := make(map[string]Reading)
	for _, q := range s.Queues() {
		var r Reading
		if q.Read(&r) == nil {
			all[q.name] = r
		}
	}
	text, err := json.Marshal(all)
	if err != nil { // a Reading has only numbers
		return "{}"
	}
	return string(text)
}

// changed makes the list anew, and starts or stops the sampler. s.mu is held.
func (s *Set) changed() {
	s.list = make([]*Queue, 0, len(s.queues))
	for _, q := range s.queues {
		s.list = append(s.list, q)
	}
	slices.SortFunc(s.list, func(a, b *Queue) int { return strings.Compare(a.name, b.name) })
	switch {
	case len(s.list) == 0 && s.stop != nil:
		close(s.stop)
		s.stop = nil
	case len(s.list) > 0 && s.stop == nil && s.config.Interval > 0:
		s.stop = make(chan struct{})
		go s.sample(s.stop)
	}
}

// sample reads all queues at each interval until stop is closed.
func (s *Set) sample(stop <-chan struct{}) {
	tick := time.NewTicker(s.config.Interval)
	defer tick.Stop()
	var r Reading
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		for _, q := range s.Queues() {
			if !q.look(&r) {
				s.remove(q)
			}
		}
	}
}
