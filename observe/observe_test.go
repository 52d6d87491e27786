package observe

import (
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const soon = 20 * time.Second

func listen(t testing.TB, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func newSet(t testing.TB, c Config) *Set {
	t.Helper()
	s := NewSet(c)
	t.Cleanup(func() { s.Close() })
	return s
}

func add(t testing.TB, s *Set, name string, l syscall.Conn) *Queue {
	t.Helper()
	q, err := s.Add(name, l)
	require.NoError(t, err)
	return q
}

func read(t testing.TB, q *Queue) (r Reading) {
	t.Helper()
	require.NoError(t, q.Read(&r))
	return r
}

// queued connects n clients and waits until they are queued.
func queued(t testing.TB, ln *acceptq.Listener, n int) (clients []net.Conn) {
	t.Helper()
	for range n {
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err != nil || s.Queued == n
	}, soon, time.Millisecond)
	return clients
}

func TestReadingIsThatOfTheListener(t *testing.T) {
	s := newSet(t, Config{})
	ln := listen(t, acceptq.WithBacklog(7))
	q := add(t, s, "api", ln)
	queued(t, ln, 3)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	r := read(t, q)
	want, err := ln.Stats()
	if !errors.Is(err, errors.ErrUnsupported) {
		require.NoError(t, err)
	}
	require.Equal(t, want, r.Stats)
	require.EqualValues(t, 1, r.Accepted)
	require.Equal(t, 7, r.Requested)
	require.Equal(t, want.Queued, r.Peak)
	require.Equal(t, []Numbers{r.Numbers}, r.Shards)
	require.Equal(t, time.Duration(unknown), r.OldestWait, "nobody asked for it")
	require.Equal(t, unknown, r.Handshakes)
	require.Equal(t, "api", q.Name())
	require.Equal(t, 1, q.Len())
	require.Nil(t, q.Exporter())

	// SetBacklog changes the limit, so the request is read again.
	if _, err := ln.SetBacklog(5); err == nil && want.Limit == 7 {
		require.Equal(t, 5, read(t, q).Requested)
	}
	// What package net made has no request and no counter.
	other, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer other.Close()
	r = read(t, add(t, s, "net", other.(*net.TCPListener)))
	require.Equal(t, []int64{unknown, unknown}, []int64{int64(r.Requested), r.Accepted})
}

// Of eight shards one is full, and the sums say so.
func TestSumsShowTheFullestShard(t *testing.T) {
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 8, acceptq.WithBacklog(15))
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer shards.Close()
	s := newSet(t, Config{})
	q, err := s.AddShards("api", shards)
	require.NoError(t, err)
	require.Equal(t, 8, q.Len())
	r := read(t, q)
	if r.Stats.Capacity == unknown {
		t.Skip("this system does not report the queue")
	}
	require.Len(t, r.Shards, 8)
	want, err := shards.Stats()
	require.NoError(t, err)
	require.Equal(t, want, r.Stats)
	require.Equal(t, 8*15, r.Requested)
	require.Zero(t, r.Accepted)

	each := make([]Numbers, 8)
	for i := range each {
		each[i] = Numbers{Stats: acceptq.Stats{Capacity: 16, Limit: 15}, Requested: 15}
	}
	each[5].Stats.Queued, each[5].Peak, each[5].FullestPeak, each[2].FullestPeak = 16, 16, 1, 0.5
	total := sum(each)
	part, known := total.Stats.Utilization()
	require.True(t, known)
	require.Equal(t, 1.0, part)
	require.Equal(t, 16, total.Stats.Queued)
	require.Equal(t, 1.0, total.FullestPeak)
	each[0].Stats.Queued, each[0].FullestPeak, each[0].Accepted = unknown, unknown, unknown
	total = sum(each)
	require.Nil(t, total.Stats.Fullest, "the unknown one may be the fullest")
	require.Equal(t, []any{unknown, float64(unknown), int64(unknown)}, []any{total.Stats.Queued, total.FullestPeak, total.Accepted})
}

func TestOldestWaitAndHandshakes(t *testing.T) {
	s := newSet(t, Config{OldestWait: time.Nanosecond, Handshakes: time.Nanosecond})
	ln := listen(t)
	q := add(t, s, "api", ln)
	if _, err := ln.Waiting(t.Context()); errors.Is(err, errors.ErrUnsupported) {
		r := read(t, q)
		require.Equal(t, unknown, r.Handshakes)
		return
	}
	r := read(t, q)
	require.Zero(t, r.OldestWait, "no connection waits")
	require.Zero(t, r.Handshakes)
	queued(t, ln, 1)
	require.Eventually(t, func() bool { return read(t, q).OldestWait >= 100*time.Millisecond }, soon, time.Millisecond)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	require.Zero(t, read(t, q).OldestWait)
}

// The kernel is asked only if a connection waits, at most once in the chosen time, and by
// one reading at a time. If it does not answer, the number is unknown.
func TestQuestionsAreRare(t *testing.T) {
	ln := listen(t)
	s := newSet(t, Config{OldestWait: time.Hour})
	q := add(t, s, "api", ln)
	asked := 0
	answer := errors.New("no answer")
	q.waiting = func(context.Context) ([]acceptq.Waiting, error) {
		asked++
		return []acceptq.Waiting{{Waited: time.Minute}}, answer
	}
	r := Reading{Numbers: Numbers{Stats: acceptq.Stats{Queued: 0}}}
	require.Zero(t, q.oldestWait(&r))
	require.Zero(t, asked, "the queue is empty")
	r.Stats.Queued = 1
	for range 3 {
		require.Equal(t, time.Duration(unknown), q.oldestWait(&r), "no answer is not a wait of 0")
	}
	require.Equal(t, 1, asked)

	q.set.config.OldestWait = time.Nanosecond
	answer = nil
	require.Equal(t, time.Minute, q.oldestWait(&r))
	q.listing.Lock() // another reading is asking
	require.Equal(t, time.Minute, q.oldestWait(&r))
	q.listing.Unlock()
	require.Equal(t, 2, asked)
	q.waiting = func(context.Context) ([]acceptq.Waiting, error) { return nil, nil }
	require.Equal(t, time.Duration(unknown), q.oldestWait(&r), "the kernel lists no connection that was reset")
}

func TestClosedListenerLeaves(t *testing.T) {
	var removed []string
	s := newSet(t, Config{Export: func(q *Queue) Exporter { return &exporter{remove: func() { removed = append(removed, q.Name()) }} }})
	stays, goes := listen(t), listen(t)
	add(t, s, "stays", stays)
	q := add(t, s, "goes", goes)
	require.Len(t, s.Queues(), 2)
	_, err := s.Add("goes", listen(t))
	require.ErrorContains(t, err, `acceptq: observe listener "goes": the name is in use`)

	require.NoError(t, goes.Close())
	again := add(t, s, "goes", listen(t)) // without a reading in between
	require.Equal(t, []string{"goes"}, removed)
	var r Reading
	require.ErrorIs(t, q.Read(&r), net.ErrClosed)
	q.Remove() // it must not remove its heir
	require.Len(t, s.Queues(), 2)
	again.Remove()
	require.Equal(t, []string{"goes", "goes"}, removed)
	require.NoError(t, stays.Close())
	require.ErrorIs(t, s.Queues()[0].Read(&r), net.ErrClosed)
	require.Empty(t, s.Queues())
}

type exporter struct {
	remove func()
	waits  atomic.Int64
}

func (e *exporter) Observe(time.Duration) { e.waits.Add(1) }
func (e *exporter) Remove()               { e.remove() }

func TestBadInput(t *testing.T) {
	closed := listen(t)
	require.NoError(t, closed.Close())
	client, err := net.Dial("tcp", listen(t).Addr().String())
	require.NoError(t, err)
	defer client.Close()
	s := newSet(t, Config{})
	for _, tt := range []struct {
		name string
		l    syscall.Conn
		text string
		is   error
	}{
		{"", listen(t), "the name is empty", nil},
		{"a\xff", listen(t), "the name is not valid UTF-8", nil},
		{"nil", nil, "", syscall.EINVAL},
		{"nil listener", (*acceptq.Listener)(nil), "", syscall.EINVAL},
		{"zero listener", new(acceptq.Listener), "", syscall.EINVAL},
		{"nil TCP listener", (*net.TCPListener)(nil), "", syscall.EINVAL},
		{"a client", client.(*net.TCPConn), "", syscall.EINVAL},
		{"closed", closed, "", net.ErrClosed},
	} {
		_, err := s.Add(tt.name, tt.l)
		require.ErrorContains(t, err, tt.text, "%q", tt.name)
		if tt.is != nil {
			require.ErrorIs(t, err, tt.is, "%q", tt.name)
		}
		require.ErrorContains(t, err, fmt.Sprintf("%q", tt.name))
	}
	for _, shards := range []*acceptq.Shards{nil, new(acceptq.Shards)} {
		_, err := s.AddShards("shards", shards)
		require.ErrorIs(t, err, syscall.EINVAL)
	}
	require.Empty(t, s.Queues(), "nothing is left behind")
	require.NoError(t, s.Close())
	_, err = s.Add("late", listen(t))
	require.ErrorIs(t, err, os.ErrClosed)
	require.NoError(t, s.Close())
}

func TestSamplerEnds(t *testing.T) {
	s := newSet(t, Config{Interval: time.Millisecond})
	running := func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.stop != nil }
	require.False(t, running())
	q := add(t, s, "removed", listen(t))
	require.True(t, running())
	q.Remove()
	require.False(t, running())

	ln := listen(t)
	add(t, s, "closed", ln)
	require.NoError(t, ln.Close())
	require.Eventually(t, func() bool { return !running() }, soon, time.Millisecond)
	add(t, s, "open", listen(t))
	require.NoError(t, s.Close())
	require.False(t, running())
	// TestMain looks for its goroutines.
}

func TestSamplerSeesABurst(t *testing.T) {
	s := newSet(t, Config{Interval: time.Millisecond})
	ln := listen(t, acceptq.WithBacklog(3))
	q := add(t, s, "api", ln)
	if read(t, q).Peak == unknown {
		t.Skip("this system does not report the queue")
	}
	queued(t, ln, 3)
	require.Eventually(t, func() bool { q.mu.Lock(); defer q.mu.Unlock(); return q.sockets[0].peak.note(0, time.Minute, 0) == 3 },
		soon, time.Millisecond, "without a call of Read")
	for range 3 {
		c, err := ln.Accept()
		require.NoError(t, err)
		c.Close()
	}
	r := read(t, q)
	require.Zero(t, r.Stats.Queued)
	require.Equal(t, 3, r.Peak)
	require.InDelta(t, 3/float64(r.Stats.Capacity), r.FullestPeak, 1e-9)
}

// The kernel's counter has 32 bits.
func TestDropsDoNotWrap(t *testing.T) {
	var u unwrapped
	for _, tt := range []struct{ raw, total int64 }{
		{5, 5}, {5, 5}, {4294967295, 4294967295}, {0, 4294967296}, {7, 4294967303},
		{unknown, unknown}, {6, 4294967303 + 4294967295},
	} {
		require.Equal(t, tt.total, u.total(tt.raw))
	}
}

func TestPeakLastsForItsWindow(t *testing.T) {
	const window = 16 * time.Second // so that a part is a second
	var p peak
	note := func(at time.Duration, n int) int { return p.note(at, window, n) }
	require.Equal(t, 0, note(0, 0))
	require.Equal(t, 9, note(1500*time.Millisecond, 9))
	require.Equal(t, 9, note(1501*time.Millisecond, 2), "a burst of a millisecond stays")
	require.Equal(t, 9, note(1501*time.Millisecond, 2), "it stays when it is read")
	require.Equal(t, 9, note(10*time.Second, 0))
	require.Equal(t, 9, note(1500*time.Millisecond+window, 0), "it stays for a window")
	require.Equal(t, 3, note(1500*time.Millisecond+window+time.Second, 3), "and not for longer than a part more")
	require.Equal(t, 3, note(18*time.Second, 0))
	require.Equal(t, 1, note(1000*time.Second, 1), "after a long pause")
	require.Equal(t, unknown, new(peak).note(5, window, unknown))

	// An unknown length can be the longest, so the peak is unknown as long as it counts.
	p = peak{}
	require.Equal(t, 31, p.note(0, window, 31))
	require.Equal(t, unknown, p.note(1, window, unknown))
	require.Equal(t, unknown, p.note(2, window, 7), "in the same part of the window")
	require.Equal(t, unknown, p.note(window, window, 7))
	require.Equal(t, 7, p.note(2*window+window/peakParts, window, 7))
	require.Equal(t, 4, new(peak).note(5, 0, 4), "no window")
}

func TestConcurrently(t *testing.T) {
	s := newSet(t, Config{Interval: time.Millisecond, OldestWait: time.Millisecond, Handshakes: time.Millisecond})
	add(t, s, "stays", listen(t))
	done := make(chan struct{})
	var wait sync.WaitGroup
	for worker := range 2 {
		wait.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-done:
					return
				default:
				}
				ln, err := acceptq.ListenTCP("127.0.0.1:0")
				if err != nil {
					t.Error(err)
					return
				}
				q, err := s.Add(fmt.Sprint("worker ", worker), ln)
				if err != nil {
					t.Error(err)
					return
				}
				if round%2 == 0 {
					q.Remove()
				}
				ln.Close()
			}
		})
	}
	for range 200 {
		var all map[string]any
		require.NoError(t, json.Unmarshal([]byte(s.String()), &all))
		require.Contains(t, all, "stays")
	}
	close(done)
	wait.Wait()
}

func TestExpvar(t *testing.T) {
	s := newSet(t, Config{})
	var _ expvar.Var = s
	require.Equal(t, "{}", s.String())
	q := add(t, s, "a \"name\"", listen(t, acceptq.WithBacklog(7)))
	var all map[string]map[string]any
	require.NoError(t, json.Unmarshal([]byte(s.String()), &all))
	got := all["a \"name\""]
	require.EqualValues(t, 7, got["requested"])
	require.EqualValues(t, 0, got["accepted"])
	require.Nil(t, got["oldestWaitSeconds"], "nobody asked for it")
	require.Contains(t, got, "oldestWaitSeconds")
	require.Contains(t, got, "unknownWaits")
	r := read(t, q)
	r.OldestWait = 1500 * time.Millisecond
	text, err := json.Marshal(r)
	require.NoError(t, err)
	require.Contains(t, string(text), `"oldestWaitSeconds":1.5`)
}

func TestObserveLooksThroughWrappers(t *testing.T) {
	e := &exporter{remove: func() {}}
	s := newSet(t, Config{Export: func(*Queue) Exporter { return e }})
	ln := listen(t)
	q := add(t, s, "api", ln)
	require.Same(t, e, q.Exporter())
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	accepted, err := q.Listener(ln).Accept()
	require.NoError(t, err)
	defer accepted.Close()
	each := int64(1)
	if _, err := acceptq.QueueTime(accepted); errors.Is(err, errors.ErrUnsupported) {
		each = 0
	}
	require.Equal(t, each, e.waits.Load())
	q.Observe(wrapper{wrapper{accepted}})
	require.Equal(t, 2*each, e.waits.Load())
	ctx := q.ConnContext(t.Context(), accepted)
	require.Equal(t, t.Context(), ctx)
	require.Equal(t, 3*each, e.waits.Load())
	q.Observe(embedded{accepted})
	require.Equal(t, 4*each, e.waits.Load())
	require.Equal(t, each-1, read(t, q).UnknownWaits, "none, or the system reports no wait")

	// A wait that cannot be read is counted.
	q.Observe(nil)
	q.Observe(wrapper{})
	q.Observe(self{})
	pipe, end := net.Pipe()
	defer pipe.Close()
	defer end.Close()
	q.Observe(pipe)
	require.Equal(t, 4*each, e.waits.Load())
	require.Equal(t, 5*each-1, read(t, q).UnknownWaits)
	silent := add(t, newSet(t, Config{}), "no exporter", ln)
	silent.Observe(pipe)
	require.EqualValues(t, unknown, read(t, silent).UnknownWaits)
}

// A wrapper hides the methods of its connection, as crypto/tls does.
type wrapper struct{ inner net.Conn }

func (w wrapper) NetConn() net.Conn                { return w.inner }
func (w wrapper) Read([]byte) (int, error)         { return 0, io.EOF }
func (w wrapper) Write([]byte) (int, error)        { return 0, io.EOF }
func (w wrapper) Close() error                     { return nil }
func (w wrapper) LocalAddr() net.Addr              { return nil }
func (w wrapper) RemoteAddr() net.Addr             { return nil }
func (w wrapper) SetDeadline(time.Time) error      { return nil }
func (w wrapper) SetReadDeadline(time.Time) error  { return nil }
func (w wrapper) SetWriteDeadline(time.Time) error { return nil }

// embedded hides the methods of its connection, as golang.org/x/net/netutil does.
type embedded struct{ net.Conn }

// self wraps itself.
type self struct{ wrapper }

func (s self) NetConn() net.Conn { return s }
