package acceptqotel

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t *testing.T, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func start(t *testing.T, opts ...Option) (*Instruments, *sdk.ManualReader) {
	t.Helper()
	reader := sdk.NewManualReader()
	provider := sdk.NewMeterProvider(sdk.WithReader(reader))
	i, err := New(provider, opts...)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, i.Close())
		require.NoError(t, provider.Shutdown(context.Background()))
	})
	return i, reader
}

// collect returns each number by its name and the attributes listener and shard. Of a
// histogram it is the count.
func collect(t *testing.T, reader *sdk.ManualReader) map[string]int64 {
	t.Helper()
	var data metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(context.Background(), &data))
	numbers := make(map[string]int64)
	for _, s := range data.ScopeMetrics {
		require.Equal(t, scope, s.Scope.Name)
		for _, m := range s.Metrics {
			put := func(attrs attribute.Set, n int64) {
				key := m.Name
				for _, a := range attrs.ToSlice() {
					key += " " + a.Value.AsString()
				}
				require.NotContains(t, numbers, key)
				numbers[key] = n
			}
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					put(p.Attributes, p.Value)
				}
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					put(p.Attributes, p.Value)
				}
			case metricdata.Gauge[float64]: // in per mille
				for _, p := range d.DataPoints {
					put(p.Attributes, int64(1000*p.Value))
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					put(p.Attributes, int64(p.Count))
				}
			default:
				t.Errorf("%s is a %T", m.Name, d)
			}
		}
	}
	return numbers
}

func TestInstruments(t *testing.T) {
	i, reader := start(t, WithSampler(10*time.Millisecond, time.Minute))
	ln := listen(t, acceptq.WithBacklog(7))
	q, err := i.Add("api", ln)
	require.NoError(t, err)
	numbers := collect(t, reader)
	want, err := ln.Stats()
	require.NoError(t, err)
	for name, value := range map[string]int64{
		"tcp.accept_queue.length": int64(want.Queued), "tcp.accept_queue.length.peak": int64(want.Queued),
		"tcp.accept_queue.capacity": int64(want.Capacity), "tcp.accept_queue.limit": int64(want.Limit),
		"tcp.accept_queue.requested": 7, "tcp.accept_queue.accepted": 0, "tcp.accept_queue.drops": want.Drops, "tcp.accept_queue.held_back": int64(want.Incomplete),
	} {
		if value == unknown {
			require.NotContains(t, numbers, name+" api")
		} else {
			require.Contains(t, numbers, name+" api")
			require.Equal(t, value, numbers[name+" api"], name)
		}
	}
	require.NotContains(t, numbers, "tcp.accept_queue.wait api", "nothing was observed")

	q.Exporter().Observe(time.Second)
	require.EqualValues(t, 1, collect(t, reader)["tcp.accept_queue.wait api"])

	// A wait that cannot be read is counted, where the system reports waits.
	pipe, end := net.Pipe()
	defer pipe.Close()
	defer end.Close()
	q.Observe(pipe)
	const unknownWaits = "tcp.accept_queue.wait.unknown api"
	if runtime.GOOS == "linux" {
		require.EqualValues(t, 1, collect(t, reader)[unknownWaits])
	} else {
		require.NotContains(t, collect(t, reader), unknownWaits)
	}

	// What no one asked for is absent.
	_, err = i.Add("maximum", listen(t))
	require.NoError(t, err)
	require.NotContains(t, collect(t, reader), "tcp.accept_queue.requested maximum")

	require.NoError(t, ln.Close())
	numbers = collect(t, reader)
	require.NotContains(t, numbers, "tcp.accept_queue.length api")
	require.Contains(t, numbers, "tcp.accept_queue.length maximum")
	require.NoError(t, i.Close())
	require.NotContains(t, collect(t, reader), "tcp.accept_queue.length maximum")
}

// A nil Option and one with a time of 0 or less change nothing.
func TestOptionsThatChangeNothing(t *testing.T) {
	metrics := func(opts ...Option) []string {
		i, reader := start(t, opts...)
		_, err := i.Add("api", listen(t))
		require.NoError(t, err)
		return slices.Sorted(maps.Keys(collect(t, reader)))
	}
	plain := metrics()
	require.NotContains(t, plain, "tcp.accept_queue.length.peak api")
	for _, opts := range [][]Option{
		{nil},
		{WithSampler(0, time.Minute), WithOldestWait(0), WithHandshakes(0)},
		{WithSampler(-1, time.Minute), WithOldestWait(-1), WithHandshakes(-1)},
		{WithSampler(time.Hour, 0)},
		{WithSampler(time.Hour, -1)},
	} {
		require.Equal(t, plain, metrics(opts...))
	}
	require.Contains(t, metrics(nil, WithSampler(time.Hour, time.Minute)), "tcp.accept_queue.length.peak api")
}

func TestShards(t *testing.T) {
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2, acceptq.WithBacklog(7))
	if err != nil {
		t.Skip(err) // a system that does not spread connections
	}
	defer shards.Close()
	want, err := shards.Stats()
	require.NoError(t, err)

	summed, reader := start(t)
	_, err = summed.AddShards("api", shards)
	require.NoError(t, err)
	require.EqualValues(t, want.Capacity, collect(t, reader)["tcp.accept_queue.capacity api"])
	numbers := collect(t, reader)
	require.EqualValues(t, 14, numbers["tcp.accept_queue.requested api"])
	require.EqualValues(t, 2, numbers["tcp.accept_queue.shards api"])
	require.Contains(t, numbers, "tcp.accept_queue.fullest api")

	single, reader := start(t, WithShardLabel())
	_, err = single.AddShards("api", shards)
	require.NoError(t, err)
	_, err = single.Add("one", listen(t, acceptq.WithBacklog(7)))
	require.NoError(t, err)
	numbers = collect(t, reader)
	require.NotContains(t, numbers, "tcp.accept_queue.shards api")
	for _, key := range []string{"api 0", "api 1", "one"} {
		require.EqualValues(t, want.Capacity/2, numbers["tcp.accept_queue.capacity "+key], key)
	}
}

func TestBadInput(t *testing.T) {
	_, err := New(nil)
	require.ErrorContains(t, err, "nil MeterProvider")
	i, _ := start(t)
	_, err = i.Add("", listen(t))
	require.ErrorContains(t, err, "the name is empty")
	_, err = i.Add("nil", nil)
	require.ErrorIs(t, err, syscall.EINVAL)
	ln := listen(t)
	_, err = i.Add("api", ln)
	require.NoError(t, err)
	_, err = i.Add("api", listen(t))
	require.ErrorContains(t, err, "the name is in use")
	require.NoError(t, ln.Close())
	_, err = i.Add("closed", ln)
	require.ErrorIs(t, err, net.ErrClosed)
}

// Two Instruments of one provider would be added up.
func TestOneForEachProvider(t *testing.T) {
	reader := sdk.NewManualReader()
	provider := sdk.NewMeterProvider(sdk.WithReader(reader))
	defer provider.Shutdown(context.Background())
	first, err := New(provider)
	require.NoError(t, err)
	_, err = New(provider)
	require.ErrorContains(t, err, "the MeterProvider has Instruments already")
	_, err = first.Add("api", listen(t, acceptq.WithBacklog(7)))
	require.NoError(t, err)
	if s, err := acceptq.ReadSystem(); err == nil && s.ListenOverflows != unknown {
		require.Equal(t, s.ListenOverflows, collect(t, reader)["tcp.listen.overflows"])
	}
	require.NoError(t, first.Close())
	require.NoError(t, first.Close())
	second, err := New(provider)
	require.NoError(t, err, "the first is closed")
	require.NoError(t, second.Close())

	for range 2 { // noop's provider has no identity
		i, err := New(noop.NewMeterProvider())
		require.NoError(t, err)
		defer i.Close()
	}
}

// After Close Add fails, and no sampler runs, which TestMain checks.
func TestAddAfterClose(t *testing.T) {
	i, reader := start(t, WithSampler(10*time.Millisecond, time.Minute))
	require.NoError(t, i.Close())
	_, err := i.Add("api", listen(t))
	require.ErrorIs(t, err, os.ErrClosed)
	require.NotContains(t, collect(t, reader), "tcp.accept_queue.limit api")
}

// The SDK merges the histograms of too many names, without an error. So Add fails before.
func TestTooManyNames(t *testing.T) {
	i, reader := start(t)
	ln := listen(t)
	for n := range maxNames {
		q, err := i.Add(fmt.Sprint(n), ln)
		require.NoError(t, err)
		q.Exporter().Observe(time.Second)
		q.Remove()
	}
	_, err := i.Add("one more", ln)
	require.ErrorContains(t, err, "1900 other names have been used")
	q, err := i.Add("7", ln)
	require.NoError(t, err, "a name that was used before")
	q.Exporter().Observe(time.Second)
	numbers := collect(t, reader)
	require.EqualValues(t, 2, numbers["tcp.accept_queue.wait 7"])
	require.EqualValues(t, 1, numbers[fmt.Sprint("tcp.accept_queue.wait ", maxNames-1)])
	require.NotContains(t, numbers, "tcp.accept_queue.wait", "no series is merged")
}

func TestOldestWaitAndHandshakes(t *testing.T) {
	i, reader := start(t, WithOldestWait(5*time.Second), WithHandshakes(5*time.Second))
	ln := listen(t)
	_, err := i.Add("api", ln)
	require.NoError(t, err)
	numbers := collect(t, reader)
	if _, err := ln.Waiting(t.Context()); err != nil {
		require.NotContains(t, numbers, "tcp.accept_queue.oldest_wait api")
		return
	}
	require.Contains(t, numbers, "tcp.accept_queue.oldest_wait api")
	require.Contains(t, numbers, "tcp.accept_queue.handshakes api")
}
