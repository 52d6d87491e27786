package acceptq

import (
	"errors"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
)

// BenchmarkShards compares accepting on one shard for each core with accepting on one
// listener. Both have the same number of loops. The time is from the first client until
// the last one is accepted. It includes the handshakes, which the clients make on the
// same cores.
func BenchmarkShards(b *testing.B) {
	const clients = 200
	cores := runtime.GOMAXPROCS(0)
	many, err := ListenTCPShards("127.0.0.1:0", max(cores, 2))
	if errors.Is(err, errors.ErrUnsupported) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer many.Close()
	// One listener also has several loops, so that the comparison is not one of loops.
	ln := listenForStats(b)
	one := new(Shards)
	for range many.Len() {
		one.listeners = append(shardsOf(one), ln)
	}

	accept := func(s *Shards) side {
		accepted := make(chan net.Conn, clients)
		served := make(chan struct{})
		go func() {
			defer close(served)
			s.Serve(func(ln net.Listener) error {
				for {
					c, err := ln.Accept()
					if err != nil {
						return err
					}
					accepted <- c
				}
			})
		}()
		b.Cleanup(func() {
			s.Close()
			<-served
		})
		return func() time.Duration {
			var dialed [clients]net.Conn
			start := time.Now()
			var dialers sync.WaitGroup
			for d := range cores {
				dialers.Go(func() {
					for i := d; i < clients; i += cores {
						c, err := net.Dial("tcp", s.Addr().String())
						if err != nil {
							b.Error(err)
							return
						}
						c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
						dialed[i] = c
					}
				})
			}
			conns := make([]net.Conn, 0, clients)
			for range clients {
				select {
				case c := <-accepted:
					conns = append(conns, c)
				case <-time.After(patience):
					b.Error("a client was not accepted")
					return time.Since(start)
				}
			}
			took := time.Since(start)
			dialers.Wait()
			for _, c := range append(dialed[:], conns...) {
				if c != nil {
					c.Close()
				}
			}
			return took
		}
	}
	single, shards := accept(one), accept(many)
	r := ratios(b, single, single, shards)
	b.ReportMetric(1/r[0], "one/one")
	b.ReportMetric(1/r[1], "shards/one")
}
