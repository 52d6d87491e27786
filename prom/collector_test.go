package acceptqprom

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
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
	t.Cleanup(func() { c.Close() })
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
	q.Exporter().Observe(time.Second)
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
	require.Len(t, c.set.Queues(), 1)
}

func TestNameOfClosedListenerIsFree(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	ln := listen(t)
	q, err := c.Add("api", ln)
	require.NoError(t, err)
	q.Exporter().Observe(time.Second)
	_, err = c.Add("api", listen(t))
	require.ErrorContains(t, err, `acceptq: observe listener "api": the name is in use`)
	require.NoError(t, ln.Close())
	_, err = c.Add("api", listen(t)) // without a scrape in between
	require.NoError(t, err)
	samples := gather(t, reg)
	require.Zero(t, samples[`tcp_accept_queue_wait_seconds{listener="api"}`], "the waits are those of the new listener")
	require.NotContains(t, samples, `tcp_accept_queue_length_peak{listener="api"}`, "there is no sampler")
}

func TestLint(t *testing.T) {
	for _, opts := range [][]Option{nil, {WithSampler(10*time.Millisecond, time.Minute)}, {WithSampler(10*time.Millisecond, time.Minute), WithShardLabel(), WithOldestWait(5 * time.Second), WithHandshakes(5 * time.Second)}} {
		c := NewCollector(opts...)
		reg := registered(t, c)
		q, err := c.Add("api", listen(t, acceptq.WithBacklog(3)))
		require.NoError(t, err)
		q.Exporter().Observe(time.Second)
		problems, err := testutil.GatherAndLint(reg)
		require.NoError(t, err)
		require.Empty(t, problems)
	}
}

// A nil Option and one with a time of 0 or less change nothing.
func TestOptionsThatChangeNothing(t *testing.T) {
	metrics := func(opts ...Option) []string {
		c := NewCollector(opts...)
		reg := registered(t, c)
		_, err := c.Add("api", listen(t))
		require.NoError(t, err)
		return slices.Sorted(maps.Keys(gather(t, reg)))
	}
	plain := metrics()
	require.NotContains(t, plain, `tcp_accept_queue_length_peak{listener="api"}`)
	for _, opts := range [][]Option{
		{nil},
		{WithSampler(0, time.Minute), WithOldestWait(0), WithHandshakes(0)},
		{WithSampler(-1, time.Minute), WithOldestWait(-1), WithHandshakes(-1)},
		{WithSampler(time.Hour, 0)},
		{WithSampler(time.Hour, -1)},
	} {
		require.Equal(t, plain, metrics(opts...))
	}
	require.Contains(t, metrics(nil, WithSampler(time.Hour, time.Minute)), `tcp_accept_queue_length_peak{listener="api"}`)
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

func TestConcurrently(t *testing.T) {
	const scrapes = 1000 // in all
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 64)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer shards.Close()
	for _, opts := range [][]Option{{WithSampler(time.Millisecond, time.Minute)}, {WithShardLabel()}} {
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
					q.Exporter().Observe(time.Millisecond)
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
					q.Exporter().Observe(0)
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

// The queue that a scrape reads and the one that an alert needs: of eight shards the first
// is full.
func TestFullestShard(t *testing.T) {
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 8, acceptq.WithBacklog(3))
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer shards.Close()
	want, err := shards.Stats()
	require.NoError(t, err)
	for _, opts := range [][]Option{{WithSampler(10*time.Millisecond, time.Minute)}, {WithSampler(10*time.Millisecond, time.Minute), WithShardLabel()}} {
		c := NewCollector(opts...)
		reg := registered(t, c)
		_, err = c.AddShards("api", shards)
		require.NoError(t, err)
		_, err = c.Add("one", listen(t))
		require.NoError(t, err)
		samples := gather(t, reg)
		require.NotContains(t, samples, `tcp_accept_queue_shards{listener="one"}`)
		require.NotContains(t, samples, `tcp_accept_queue_fullest_ratio{listener="one"}`)
		if c.perShard {
			require.NotContains(t, samples, `tcp_accept_queue_shards{listener="api"}`)
			require.EqualValues(t, want.Capacity/8, samples[`tcp_accept_queue_capacity{listener="api",shard="7"}`])
			continue
		}
		require.EqualValues(t, 8, samples[`tcp_accept_queue_shards{listener="api"}`])
		require.EqualValues(t, want.Capacity, samples[`tcp_accept_queue_capacity{listener="api"}`])
		require.Contains(t, samples, `tcp_accept_queue_fullest_ratio{listener="api"}`)
		require.Contains(t, samples, `tcp_accept_queue_fullest_peak_ratio{listener="api"}`)
	}
}

// A Collector that is closed reports no listener, takes none and leaves no goroutine, which
// TestMain checks.
func TestClose(t *testing.T) {
	for range 50 {
		c := NewCollector(WithSampler(10*time.Millisecond, time.Minute))
		ln := listen(t)
		_, err := c.Add("api", ln)
		require.NoError(t, err)
		require.NoError(t, c.Close())
		_, err = c.Add("api", ln)
		require.ErrorIs(t, err, os.ErrClosed)
		_, err = ln.Stats()
		require.NotErrorIs(t, err, net.ErrClosed, "the listener stays open")
	}
	c := NewCollector()
	reg := registered(t, c)
	_, err := c.Add("api", listen(t))
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.Empty(t, of(gather(t, reg), "api"))
}

func TestAccepted(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	ln := listen(t)
	_, err := c.Add("api", ln)
	require.NoError(t, err)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer other.Close()
	_, err = c.Add("net", other.(*net.TCPListener))
	require.NoError(t, err)
	require.Zero(t, gather(t, reg)[`tcp_accept_queue_accepted_total{listener="api"}`])
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()
	samples := gather(t, reg)
	require.EqualValues(t, 1, samples[`tcp_accept_queue_accepted_total{listener="api"}`])
	require.NotContains(t, samples, `tcp_accept_queue_accepted_total{listener="net"}`, "it is unknown, not 0")
	require.NotContains(t, samples, `tcp_accept_queue_oldest_wait_seconds{listener="api"}`, "nobody asked for it")
}

// A connection whose wait cannot be read is counted. So an empty histogram has an explanation.
func TestUnknownWaits(t *testing.T) {
	c := NewCollector(WithShardLabel())
	reg := registered(t, c)
	q, err := c.Add("api", listen(t))
	require.NoError(t, err)
	const name = `tcp_accept_queue_wait_unknown_total{listener="api"}`
	if !waits {
		require.NotContains(t, gather(t, reg), name)
		return
	}
	require.Contains(t, gather(t, reg), name, "increase() needs a first sample")
	pipe, end := net.Pipe()
	defer pipe.Close()
	defer end.Close()
	q.ConnContext(t.Context(), pipe)
	samples := gather(t, reg)
	require.EqualValues(t, 1, samples[name])
	require.Zero(t, samples[`tcp_accept_queue_wait_seconds{listener="api"}`])
}

// A scrape opens the files of the system, and none for each listener.
func TestScrapeReadsNoFileForEachListener(t *testing.T) {
	c := NewCollector()
	reg := registered(t, c)
	allocs := func(listeners int) float64 {
		for len(c.set.Queues()) < listeners {
			_, err := c.Add(fmt.Sprint(len(c.set.Queues())), listen(t))
			require.NoError(t, err)
		}
		gather(t, reg) // the first one reads what was requested
		ch := make(chan prometheus.Metric, 20*listeners+20)
		return testing.AllocsPerRun(3, func() {
			c.Collect(ch)
			for len(ch) > 0 {
				<-ch
			}
		})
	}
	one := allocs(1)
	require.Less(t, (allocs(51)-one)/50, 6.0, "allocations for each further listener; a file costs 12")
}
