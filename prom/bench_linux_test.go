package acceptqprom

import (
	"fmt"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/acceptq/acceptq"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func many(b *testing.B, c *Collector, n int) (fds []int) {
	for i := range n {
		ln := listen(b, acceptq.WithBacklog(16))
		_, err := c.Add(fmt.Sprint(i), ln)
		require.NoError(b, err)
		raw, err := ln.SyscallConn()
		require.NoError(b, err)
		require.NoError(b, raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }))
	}
	return fds
}

// bare makes the two system calls of a reading for each socket, as plainly as Go can.
func bare(b *testing.B, fds []int, mem []uint32) {
	for _, fd := range fds {
		if _, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err != nil {
			b.Fatal(err)
		}
		size := uint32(4 * len(mem))
		_, _, errno := syscall.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&mem[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			b.Fatal(errno)
		}
	}
}

// BenchmarkScrape compares Collect, and a whole scrape of the registry, with the bare
// system calls of as many listeners. They take turns in one run, and the ratios are of
// the sums. The ratio "noise" compares the bare calls with themselves.
func BenchmarkScrape(b *testing.B) {
	for _, n := range []int{1, 64, 1000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			c := NewCollector()
			reg := prometheus.NewRegistry()
			require.NoError(b, reg.Register(c))
			fds := many(b, c, n)
			mem := make([]uint32, 9)
			ch := make(chan prometheus.Metric, 16*n+16)
			var calls, again, collect, gather time.Duration
			timed := func(sum *time.Duration, f func()) {
				start := time.Now()
				f()
				*sum += time.Since(start)
			}
			for b.Loop() {
				timed(&calls, func() { bare(b, fds, mem) })
				timed(&collect, func() { c.Collect(ch) })
				for len(ch) > 0 {
					<-ch
				}
				timed(&again, func() { bare(b, fds, mem) })
				timed(&gather, func() { reg.Gather() })
			}
			pair := float64(calls+again) / 2
			b.ReportMetric(float64(collect)/pair, "collect/bare")
			b.ReportMetric(float64(gather)/pair, "gather/bare")
			b.ReportMetric(float64(again)/float64(calls), "noise")
			b.ReportMetric(float64(collect.Nanoseconds())/float64(b.N)/float64(n), "collect-ns/listener")
			b.ReportMetric(testing.AllocsPerRun(10, func() {
				c.Collect(ch)
				for len(ch) > 0 {
					<-ch
				}
			})/float64(n), "collect-allocs/listener")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkSampler reports which part of a core the sampler takes: the processor time of
// this process, which does nothing else, in per cent of the time that passes. A bare ticker
// at the same interval shows what the wake-ups alone cost here. They take turns in one run;
// one iteration takes three seconds.
func BenchmarkSampler(b *testing.B) {
	for _, n := range []int{1, 64, 1000} {
		b.Run(fmt.Sprintf("listeners=%d", n), func(b *testing.B) {
			var with, ticker, without, wall time.Duration
			for range b.N {
				without += idle(b, n)
				with += idle(b, n, WithSampler(10*time.Millisecond, time.Minute))
				tick := time.NewTicker(10 * time.Millisecond)
				done := make(chan struct{})
				go func() {
					for {
						select {
						case <-tick.C:
						case <-done:
							return
						}
					}
				}()
				ticker += idle(b, n)
				tick.Stop()
				close(done)
				wall += time.Second
			}
			part := func(d time.Duration) float64 { return 100 * float64(d) / float64(wall) }
			b.ReportMetric(part(without), "%core-without")
			b.ReportMetric(part(ticker), "%core-ticker")
			b.ReportMetric(part(with), "%core-sampler")
			b.ReportMetric(float64(with)/float64(ticker), "sampler/ticker")
			b.ReportMetric(part(with-ticker)/float64(n), "%core-reading/listener")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// idle returns the processor time that this process takes in a second.
func idle(b *testing.B, n int, opts ...Option) time.Duration {
	c := NewCollector(opts...)
	many(b, c, n)
	before := processorTime(b)
	time.Sleep(time.Second)
	used := processorTime(b) - before
	c.Close()
	return used
}

func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
