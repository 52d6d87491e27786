package acceptqprom

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

// ownName is the content of comm of this process.
func ownName(t testing.TB) string {
	t.Helper()
	comm, err := os.ReadFile("/proc/self/comm")
	require.NoError(t, err)
	return strings.TrimSuffix(string(comm), "\n")
}

// The collector reports of real sockets what their owner reads of them.
func TestMachineOfRealListeners(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		c, err := NewMachineCollector()
		require.NoError(t, err)
		reg := prometheus.NewPedanticRegistry()
		require.NoError(t, reg.Register(c))
		require.NotContains(t, fmt.Sprint(gather(t, reg)), "tcp_accept_queue_length", "nothing listens here")

		ln := listen(t, acceptq.WithBacklog(2))
		for range 3 {
			require.True(t, dial(t, ln.Addr(), 20*time.Second))
		}
		dial(t, ln.Addr(), 50*time.Millisecond) // meets a full queue
		v6, err := net.Listen("tcp", "[::1]:0") // MPTCP where the kernel offers it
		require.NoError(t, err)
		defer v6.Close()
		wrapped, err := acceptq.Wrap(v6)
		require.NoError(t, err)
		_, err = wrapped.SetBacklog(0)
		require.NoError(t, err)
		require.True(t, dial(t, v6.Addr(), 20*time.Second))
		dial(t, v6.Addr(), 50*time.Millisecond) // meets a full queue
		first, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort(), acceptq.WithBacklog(0))
		require.NoError(t, err)
		defer first.Close()
		group := []*acceptq.Listener{first}
		for range 7 {
			ln, err := acceptq.ListenTCP(first.Addr().String(), acceptq.WithReusePort(), acceptq.WithBacklog(9))
			require.NoError(t, err)
			defer ln.Close()
			group = append(group, ln)
		}
		require.Eventually(t, func() bool {
			dial(t, first.Addr(), 10*time.Millisecond)
			s, err := first.Stats()
			return err == nil && s.Queued == s.Capacity
		}, 60*time.Second, time.Millisecond)

		samples := gather(t, reg)
		value := func(name string, addr net.Addr) float64 {
			t.Helper()
			a := addr.String()
			key := fmt.Sprintf("tcp_accept_queue_%s{address=%q,listener=%q,process=%q}", name, a, ownName(t)+" "+a, ownName(t))
			require.Contains(t, samples, key)
			return samples[key]
		}
		want, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, 3, want.Queued)
		require.Positive(t, want.Drops)
		require.EqualValues(t, want.Queued, value("length", ln.Addr()))
		require.EqualValues(t, want.Capacity, value("capacity", ln.Addr()))
		require.EqualValues(t, want.Limit, value("limit", ln.Addr()))
		require.EqualValues(t, want.Drops, value("drops_total", ln.Addr()))
		require.EqualValues(t, 1, value("length", v6.Addr()))
		require.Positive(t, value("drops_total", v6.Addr()), "the exporter knows those of an MPTCP listener too")

		var sum acceptq.Stats
		for _, ln := range group {
			s, err := ln.Stats()
			require.NoError(t, err)
			sum.Queued += s.Queued
			sum.Capacity += s.Capacity
			sum.Drops += s.Drops
		}
		require.EqualValues(t, 8, value("shards", first.Addr()))
		require.EqualValues(t, sum.Queued, value("length", first.Addr()))
		require.EqualValues(t, 1+7*10, value("capacity", first.Addr()))
		require.EqualValues(t, sum.Drops, value("drops_total", first.Addr()))
		require.EqualValues(t, 1, value("fullest_ratio", first.Addr()), "the first is full, the others are not")

		// What the first of the group has dropped stays in the sum when it is closed.
		require.NoError(t, first.Close())
		samples = gather(t, reg)
		require.EqualValues(t, 7, value("shards", first.Addr()))
		require.GreaterOrEqual(t, value("drops_total", first.Addr()), float64(sum.Drops))
	})
}

// Listeners come and go while the collector is scraped by several at once.
func TestMachineConcurrently(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		c, err := NewMachineCollector(WithMaxListeners(3))
		require.NoError(t, err)
		reg := prometheus.NewPedanticRegistry()
		require.NoError(t, reg.Register(c))
		stays := listen(t)
		done := make(chan struct{})
		scraper := make(chan struct{})
		go func() {
			defer close(scraper)
			for {
				select {
				case <-done:
					return
				default:
				}
				gather(t, reg)
			}
		}()
		for range 100 {
			for range 5 {
				ln, err := acceptq.ListenTCP("127.0.0.1:0")
				require.NoError(t, err)
				defer ln.Close()
			}
			gather(t, reg)
		}
		close(done)
		<-scraper
		found := 0
		for key := range gather(t, reg) {
			if strings.HasPrefix(key, "tcp_accept_queue_length{") {
				found++
			}
		}
		require.Equal(t, 3+1, found, "three and the rest")
		_, err = stays.Stats()
		require.NoError(t, err)
	})
}

// BenchmarkMachine compares Collect with the listing of the sockets, which is the part of the
// kernel. /proc is read before.
func BenchmarkMachine(b *testing.B) {
	for _, n := range []int{10, 200, 1000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			for i := range n {
				ln, err := acceptq.ListenTCP(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 1, byte(i % 250)}), 0).String())
				require.NoError(b, err)
				defer ln.Close()
			}
			c, err := NewMachineCollector(WithMaxListeners(n + 100))
			require.NoError(b, err)
			ch := make(chan prometheus.Metric, 10*n+1000)
			collect := func() {
				c.Collect(ch)
				for len(ch) > 0 {
					<-ch
				}
			}
			var list, all time.Duration
			for b.Loop() {
				start := time.Now()
				_, err := acceptq.Queues(b.Context())
				require.NoError(b, err)
				list += time.Since(start)
				start = time.Now()
				collect()
				all += time.Since(start)
			}
			b.ReportMetric(float64(list.Microseconds())/float64(b.N), "list-µs")
			b.ReportMetric(float64(all.Microseconds())/float64(b.N), "collect-µs")
			b.ReportMetric(testing.AllocsPerRun(10, collect)/float64(n), "allocs/listener")
			b.ReportMetric(float64(c.answered.Microseconds()), "proc-µs")
			b.ReportMetric(0, "ns/op")
		})
	}
}
