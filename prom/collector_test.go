package acceptqprom

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func listen(t testing.TB, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// registered returns a registry that checks everything, with c in it.
func registered(t testing.TB, c *Collector) *prometheus.Registry {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	require.NoError(t, reg.Register(c))
	t.Cleanup(func() {
		for _, q := range c.all() {
			q.Remove()
		}
	})
	return reg
}

// gather scrapes reg and returns each sample by its name and labels, as in
// `tcp_accept_queue_length{listener="api"}`. Of a histogram it is the count.
func gather(t testing.TB, reg prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	samples := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				if l.GetValue() != "" {
					labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
				}
			}
			key := f.GetName()
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			if _, twice := samples[key]; twice {
				t.Errorf("twice: %s", key)
			}
			switch {
			case m.Histogram != nil:
				samples[key] = float64(m.Histogram.GetSampleCount())
			case m.Counter != nil:
				samples[key] = m.Counter.GetValue()
			default:
				samples[key] = m.Gauge.GetValue()
			}
		}
	}
	return samples
}

// of returns the names of the samples of one listener.
func of(samples map[string]float64, listener string) []string {
	var names []string
	for key := range maps.Keys(samples) {
		if name, labels, _ := strings.Cut(key, "{"); strings.Contains(labels, fmt.Sprintf("listener=%q", listener)) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestClosedListenerDisappears(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	stays, goes := listen(t), listen(t)
	_, err := c.Add("stays", stays)
	require.NoError(t, err)
	q, err := c.Add("goes", goes)
	require.NoError(t, err)
	q.observe(time.Second)
	require.NotEmpty(t, of(gather(t, reg), "goes"))

	require.NoError(t, goes.Close())
	samples := gather(t, reg)
	require.Empty(t, of(samples, "goes"), "it is closed")
	require.NotEmpty(t, of(samples, "stays"))

	// Its name is free, and the new one does not begin with the old one's waits.
	again, err := c.Add("goes", listen(t))
	require.NoError(t, err)
	require.Zero(t, gather(t, reg)[`tcp_accept_queue_wait_seconds{listener="goes"}`])

	q.Remove() // the one before; it must not remove its heir
	require.NotEmpty(t, of(gather(t, reg), "goes"))
	again.Remove()
	require.Empty(t, of(gather(t, reg), "goes"))
	require.Len(t, c.all(), 1)
}

func TestNameOfClosedListenerIsFree(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	ln := listen(t)
	q, err := c.Add("api", ln)
	require.NoError(t, err)
	q.observe(time.Second)
	_, err = c.Add("api", listen(t))
	require.ErrorContains(t, err, `acceptq: report listener "api": the name is in use`)
	require.NoError(t, ln.Close())
	_, err = c.Add("api", listen(t)) // without a scrape in between
	require.NoError(t, err)
	samples := gather(t, reg)
	require.Zero(t, samples[`tcp_accept_queue_wait_seconds{listener="api"}`], "the waits are those of the new listener")
	require.NotContains(t, samples, `tcp_accept_queue_length_peak{listener="api"}`, "there is no sampler")
}

func TestBadInput(t *testing.T) {
	closed := listen(t)
	require.NoError(t, closed.Close())
	client, err := net.Dial("tcp", listen(t).Addr().String())
	require.NoError(t, err)
	defer client.Close()
	c := NewCollector()
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
		_, err := c.Add(tt.name, tt.l)
		require.ErrorContains(t, err, tt.text, "%q", tt.name)
		if tt.is != nil {
			require.ErrorIs(t, err, tt.is, "%q", tt.name)
		}
		require.ErrorContains(t, err, fmt.Sprintf("%q", tt.name))
	}
	for _, s := range []*acceptq.Shards{nil, new(acceptq.Shards)} {
		_, err := c.AddShards("shards", s)
		require.ErrorIs(t, err, syscall.EINVAL)
	}
	require.Empty(t, c.all(), "nothing is left behind")
}

func TestLint(t *testing.T) {
	for _, opts := range [][]Option{nil, {WithSampler(0, 0)}, {WithSampler(0, 0), WithShardLabel()}} {
		c := NewCollector(opts...)
		reg := registered(t, c)
		q, err := c.Add("api", listen(t, acceptq.WithBacklog(3)))
		require.NoError(t, err)
		q.observe(time.Second)
		problems, err := testutil.GatherAndLint(reg)
		require.NoError(t, err)
		require.Empty(t, problems)
	}
}

func TestTwoCollectors(t *testing.T) {
	first, second := NewCollector(), NewCollector()
	for _, c := range []*Collector{first, second} {
		_, err := c.Add("api", listen(t, acceptq.WithBacklog(7)))
		require.NoError(t, err)
	}

	// A second one in the same registry gets an error that leads to the first.
	reg := registered(t, first)
	var already prometheus.AlreadyRegisteredError
	require.ErrorAs(t, reg.Register(second), &already)
	require.Same(t, first, already.ExistingCollector)

	// With labels of their own both are welcome. The first one is in two registries then,
	// which do not disturb each other.
	both := prometheus.NewPedanticRegistry()
	require.NoError(t, prometheus.WrapRegistererWith(prometheus.Labels{"app": "first"}, both).Register(first))
	require.NoError(t, prometheus.WrapRegistererWith(prometheus.Labels{"app": "second"}, both).Register(second))
	samples := gather(t, both)
	require.EqualValues(t, 8, samples[`tcp_accept_queue_capacity{app="first",listener="api"}`])
	require.EqualValues(t, 8, samples[`tcp_accept_queue_capacity{app="second",listener="api"}`])
	require.EqualValues(t, 8, gather(t, reg)[`tcp_accept_queue_capacity{listener="api"}`])
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

func TestSamplerEndsWithTheLastListener(t *testing.T) {
	c := NewCollector(WithSampler(time.Millisecond, 0))
	running := func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.stop != nil }
	require.False(t, running())
	q, err := c.Add("removed", listen(t))
	require.NoError(t, err)
	require.True(t, running())
	q.Remove()
	require.False(t, running())

	ln := listen(t)
	_, err = c.Add("closed", ln)
	require.NoError(t, err)
	require.True(t, running())
	require.NoError(t, ln.Close())
	require.Eventually(t, func() bool { return !running() }, 20*time.Second, time.Millisecond)
	// TestMain looks for its goroutines.
}

func TestConcurrently(t *testing.T) {
	const scrapes = 1000 // in all
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 64)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer shards.Close()
	for _, opts := range [][]Option{{WithSampler(time.Millisecond, 0)}, {WithShardLabel()}} {
		c := NewCollector(opts...)
		reg := registered(t, c)
		q, err := c.AddShards("shards", shards)
		require.NoError(t, err)

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
					q, err := c.Add(fmt.Sprintf("worker %d", worker), ln)
					if err != nil {
						t.Error(err)
						return
					}
					q.observe(time.Millisecond)
					if round%2 == 0 {
						q.Remove()
					}
					ln.Close()
				}
			})
		}
		for range 2 {
			wait.Go(func() {
				for range scrapes / 8 {
					samples := gather(t, reg)
					if len(of(samples, "shards")) < 4 {
						t.Error("the shards are missing")
					}
					q.observe(0)
				}
			})
		}
		for range scrapes / 4 {
			gather(t, reg)
		}
		close(done)
		wait.Wait()
		if waits {
			require.EqualValues(t, scrapes/4, gather(t, reg)[`tcp_accept_queue_wait_seconds{listener="shards"}`])
		}
	}
}

func TestObserveLooksThroughWrappers(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	ln := listen(t)
	q, err := c.Add("api", ln)
	require.NoError(t, err)
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()

	q.Observe(wrapper{wrapper{accepted}})
	samples := gather(t, reg)
	if _, err := acceptq.QueueTime(accepted); errors.Is(err, errors.ErrUnsupported) {
		require.NotContains(t, samples, `tcp_accept_queue_wait_seconds{listener="api"}`)
	} else {
		require.EqualValues(t, 1, samples[`tcp_accept_queue_wait_seconds{listener="api"}`])
	}
	q.Observe(nil)
	q.Observe(wrapper{})
	pipe, end := net.Pipe()
	defer pipe.Close()
	defer end.Close()
	q.Observe(pipe)
	q.Observe(self{})
	require.Equal(t, samples[`tcp_accept_queue_wait_seconds{listener="api"}`], gather(t, reg)[`tcp_accept_queue_wait_seconds{listener="api"}`])
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

// self wraps itself.
type self struct{ wrapper }

func (s self) NetConn() net.Conn { return s }
