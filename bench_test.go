package acceptq

import (
	"net"
	"slices"
	"testing"
	"time"
)

// The benchmarks here compare several sides. Each reports ratios of one run in which
// the sides alternate, so that changes in the load of the machine affect all of them.
// The first two sides are the same: the difference of their ratio from 1 is the noise.

// A side runs one of the compared operations. It returns the time that this took.
type side = func() time.Duration

// ratios runs the sides in turn. For each side after the first it returns the median of
// the ratio of its time to that of the first side in the same turn.
func ratios(b *testing.B, sides ...side) []float64 {
	var parts [][]float64
	for range sides {
		parts = append(parts, nil)
	}
	took := make([]time.Duration, len(sides))
	for turn := 0; b.Loop(); turn++ {
		for i := range sides {
			first := (turn + i) % len(sides)
			took[first] = sides[first]()
		}
		for i := range sides {
			parts[i] = append(parts[i], float64(took[i])/float64(took[0]))
		}
	}
	b.ReportMetric(0, "ns/op") // the time of all sides together has no meaning
	var medians []float64
	for _, p := range parts[1:] {
		slices.Sort(p)
		medians = append(medians, p[len(p)/2])
	}
	return medians
}

func BenchmarkEffectiveBacklog(b *testing.B) {
	ln := listenForStats(b)
	b.ReportAllocs()
	for b.Loop() {
		ln.EffectiveBacklog()
	}
}

// BenchmarkAccept compares Accept of a Listener with Accept of a listener of net, both on
// plain TCP. It measures the time to accept the connections of a full queue.
func BenchmarkAccept(b *testing.B) {
	const queued = 64
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	bare, err := lc.Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer bare.Close()
	accept := func(ln net.Listener) side {
		return func() time.Duration {
			conns := make([]net.Conn, 0, 2*queued)
			for range queued {
				c, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
				conns = append(conns, c)
			}
			start := time.Now()
			for range queued {
				c, err := ln.Accept()
				if err != nil {
					b.Fatal(err)
				}
				conns = append(conns, c)
			}
			took := time.Since(start)
			for _, c := range conns {
				c.Close()
			}
			return took
		}
	}
	r := ratios(b, accept(bare), accept(bare), accept(listenForStats(b)))
	b.ReportMetric(1/r[0], "bare/bare")
	b.ReportMetric(1/r[1], "ours/bare")
}
