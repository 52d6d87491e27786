package e2e

import (
	"net"
	"testing"
	"time"

	"github.com/acceptq/acceptq/internal/testkit"
)

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
	accept := func(ln net.Listener) testkit.Side {
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
	r := testkit.Ratios(b, accept(bare), accept(bare), accept(listenForStats(b)))
	b.ReportMetric(1/r[0], "bare/bare")
	b.ReportMetric(1/r[1], "ours/bare")
}
