//go:build linux

package main

import (
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"golang.org/x/sys/unix"
)

// shuffled runs a benchmark for each candidate, in a new random order each time, so that no
// candidate always runs after the same other one.
func shuffled[T any](b *testing.B, all []T, name func(T) string, run func(*testing.B, T)) {
	for _, i := range rand.Perm(len(all)) {
		b.Run("with="+slug(name(all[i])), func(b *testing.B) { run(b, all[i]) })
	}
}

func itself(name string) string { return name }
func nameOf(c candidate) string { return c.name }

func listen(b *testing.B, peer, addr string) net.Listener {
	ln, err := peers[peer](addr)
	if err != nil {
		b.Fatal(err)
	}
	return ln
}

// cpuTime is the CPU time of this process, user and system.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(unix.TimevalToNsec(u.Utime) + unix.TimevalToNsec(u.Stime))
}

func reportCPU(b *testing.B, used time.Duration) {
	b.ReportMetric(float64(used)/float64(b.N), "cpu-ns/op")
}

// BenchmarkListen times Listen and Close together. For an address without a host
// package net opens one socket for both IP families, in a different code path.
func BenchmarkListen(b *testing.B) {
	for _, addr := range []struct{ name, addr string }{{"literal", "127.0.0.1:0"}, {"wildcard", ":0"}} {
		b.Run("addr="+addr.name, func(b *testing.B) {
			shuffled(b, peerNames, itself, func(b *testing.B, p string) {
				start := cpuTime()
				for range b.N {
					if err := listen(b, p, addr.addr).Close(); err != nil {
						b.Fatal(err)
					}
				}
				reportCPU(b, cpuTime()-start)
			})
		})
	}
}

// BenchmarkAccept times Accept while clients wait in the queue. Clients connect while
// the timer is stopped.
func BenchmarkAccept(b *testing.B) {
	shuffled(b, peerNames, itself, func(b *testing.B, p string) {
		ln := listen(b, p, "127.0.0.1:0")
		defer ln.Close()
		conns := make([]net.Conn, 0, 1000)
		var used time.Duration
		b.ResetTimer()
		for left := b.N; left > 0; {
			b.StopTimer()
			clients := fill(b, ln, min(left, cap(conns)))
			runtime.GC() // so that no candidate collects the garbage of another
			b.StartTimer()
			start := cpuTime()
			for range clients {
				c, err := ln.Accept()
				if err != nil {
					b.Fatal(err)
				}
				conns = append(conns, c)
			}
			used += cpuTime() - start
			b.StopTimer()
			left -= len(clients)
			for i, c := range conns {
				clients[i].close()
				c.Close()
			}
			conns = conns[:0]
			b.StartTimer()
		}
		reportCPU(b, used)
	})
}

// BenchmarkHTTP times one request over a new connection to net/http. The 8 clients
// run in this process, so all its times include theirs.
func BenchmarkHTTP(b *testing.B) {
	shuffled(b, peerNames, itself, func(b *testing.B, p string) {
		ln := listen(b, p, "127.0.0.1:0")
		srv := &http.Server{Handler: http.HandlerFunc(httpHandler)}
		go srv.Serve(ln)
		defer srv.Close()
		runtime.GC()
		start := cpuTime()
		b.ResetTimer()
		var clients sync.WaitGroup
		for i := range 8 {
			clients.Go(func() {
				for range (b.N + i) / 8 {
					if e := ask(ln.Addr(), 20*time.Second); e.err != nil {
						b.Error(e.err)
						return
					}
				}
			})
		}
		clients.Wait()
		reportCPU(b, cpuTime()-start)
	})
}

// BenchmarkMemory measures the allocations of Listen on Go's heap, and the part that an
// open listener keeps. It does not measure the memory of the kernel.
func BenchmarkMemory(b *testing.B) {
	shuffled(b, peerNames, itself, func(b *testing.B, p string) {
		listeners := make([]net.Listener, b.N)
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC() // finalizers and pools need a second collection
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before := heap()
		b.ReportAllocs()
		b.ResetTimer()
		for i := range listeners {
			listeners[i] = listen(b, p, "127.0.0.1:0")
		}
		b.StopTimer()
		b.ReportMetric((float64(heap())-float64(before))/float64(b.N), "kept-B/op")
		for _, ln := range listeners {
			ln.Close()
		}
	})
}

// BenchmarkRead times one reading of an accept queue, with growing numbers of other
// sockets. Every reader must find the queued clients.
func BenchmarkRead(b *testing.B) {
	for _, size := range readSizes {
		b.Run(strings.TrimPrefix(readBench(size), "Read/"), func(b *testing.B) {
			ln := listen(b, ours, "127.0.0.1:0").(*acceptq.Listener)
			defer ln.Close()
			for _, c := range fill(b, ln, readQueued) {
				defer c.close()
			}
			defer crowd(b, size)()
			readers, closeAll := openReaders(b, ln)
			defer closeAll()
			shuffled(b, readerNames, itself, func(b *testing.B, name string) {
				if program, _, _ := strings.Cut(name, " "); program == "ss" {
					if _, err := exec.LookPath(program); err != nil {
						b.Skip(err) // the table then has "unknown"
					}
				}
				for range b.N {
					if n, err := readers[name](); err != nil || n != readQueued {
						b.Fatalf("%d queued, %v; want %d", n, err, readQueued)
					}
				}
			})
		})
	}
}

// BenchmarkProgram builds the smallest program with each library.
func BenchmarkProgram(b *testing.B) {
	dir := build(b)
	for _, c := range programs {
		b.Run("with="+slug(c.name), func(b *testing.B) {
			info, err := os.Stat(filepath.Join(dir, c.program))
			if err != nil {
				b.Fatal(err)
			}
			out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./internal/alone/"+c.program).Output()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(info.Size()), "size-B")
			packages := slices.DeleteFunc(strings.Fields(string(out)), func(p string) bool { return strings.Contains(p, "acceptq/bench/") })
			b.ReportMetric(float64(len(packages)), "packages")
		})
	}
}

// build builds the programs of internal/alone, without symbols.
func build(b *testing.B) (dir string) {
	dir = b.TempDir()
	out, err := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", dir, "./internal/alone/...").CombinedOutput()
	if err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	return dir
}

// fill connects n clients, which wait in the queue of ln.
func fill(b *testing.B, ln net.Listener, n int) (clients []rawClient) {
	for range n {
		c, err := connectRaw(ln.Addr())
		if err != nil {
			b.Fatal(err)
		}
		clients = append(clients, c)
	}
	if err := awaitQueued(ln, n); err != nil {
		b.Fatal(err)
	}
	return clients
}

// crowd opens connections that do not belong to the listener. Each has two sockets.
func crowd(b *testing.B, sockets int) (closeAll func()) {
	ln := listen(b, netPlain, "127.0.0.1:0")
	var conns []net.Conn
	var ends []rawClient
	for range sockets / 2 {
		end, err := connectRaw(ln.Addr())
		if err != nil {
			b.Fatal(err)
		}
		conn, err := ln.Accept()
		if err != nil {
			b.Fatal(err)
		}
		ends, conns = append(ends, end), append(conns, conn)
	}
	return func() {
		for i := range ends {
			ends[i].close()
			conns[i].Close()
		}
		ln.Close()
	}
}
