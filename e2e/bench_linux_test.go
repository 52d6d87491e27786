package e2e

import (
	"fmt"
	"net"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// rawStats makes the two system calls of Stats and nothing else.
func rawStats(fd int, p *[64]byte) {
	for _, option := range [][2]uintptr{{unix.IPPROTO_TCP, unix.TCP_INFO}, {unix.SOL_SOCKET, unix.SO_MEMINFO}} {
		size := uint32(36)
		if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), option[0], option[1],
			uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
			panic(errno)
		}
	}
}

func statsOf(b *testing.B, ln *acceptq.Listener) func() {
	return func() {
		if _, err := ln.Stats(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStats compares Stats with its two bare system calls.
func BenchmarkStats(b *testing.B) {
	const calls = 1000
	ln := listenForStats(b)
	b.Run("alone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			statsOf(b, ln)()
		}
	})
	b.Run("ReadStats alone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			acceptq.ReadStats(ln.TCPListener())
		}
	})
	b.Run("beside its system calls", func(b *testing.B) {
		testkit.OnDescriptor(b, ln.TCPListener(), func(fd int) (int, error) {
			var p [64]byte
			raw := testkit.Repeat(calls, func() { rawStats(fd, &p) })
			r := testkit.Ratios(b, raw, raw, testkit.Repeat(calls, statsOf(b, ln)), testkit.Repeat(calls, func() { acceptq.ReadStats(ln.TCPListener()) }))
			b.ReportMetric(r[0], "raw/raw")
			b.ReportMetric(r[1], "stats/raw")
			b.ReportMetric(r[2], "readstats/raw")
			return 0, nil
		})
	})
}

// BenchmarkStatsAmongManySockets compares Stats with and without ten thousand other
// listening sockets in the process.
func BenchmarkStatsAmongManySockets(b *testing.B) {
	const calls, others = 2000, 10_000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < others+100 {
		b.Skipf("only %d descriptors are allowed here: ulimit -n %d", limit.Cur, others+100)
	}
	ln := listenForStats(b)
	quiet := func() time.Duration {
		measured := testkit.Repeat(calls, statsOf(b, ln))
		measured() // fill the caches again
		return measured()
	}
	crowded := func() time.Duration {
		var crowd []int
		defer func() {
			for _, fd := range crowd {
				unix.Close(fd)
			}
		}()
		for range others {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			crowd = append(crowd, fd)
			if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
				b.Fatal(err)
			}
			if err := unix.Listen(fd, 1); err != nil {
				b.Fatal(err)
			}
		}
		return quiet()
	}
	r := testkit.Ratios(b, quiet, quiet, crowded)
	b.ReportMetric(r[0], "quiet/quiet")
	b.ReportMetric(r[1], "crowded/quiet")
}

// BenchmarkDrain compares draining 64 shards with draining one listener, while many
// connections exist: the kernel walks its whole table of sockets for each look.
func BenchmarkDrain(b *testing.B) {
	const connections = 5000 // 10,000 sockets
	other, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer other.Close()
	for range connections {
		for _, open := range []func() (net.Conn, error){
			func() (net.Conn, error) { return net.Dial("tcp", other.Addr().String()) },
			other.Accept,
		} {
			c, err := open()
			if err != nil {
				b.Skipf("%v: raise the limit of open files, ulimit -n", err)
			}
			c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
			defer c.Close()
		}
	}
	drain := func(n int) testkit.Side {
		return func() time.Duration {
			s, err := acceptq.ListenTCPShards("127.0.0.1:0", n)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			start := time.Now()
			if err := s.Drain(b.Context()); err != nil {
				b.Fatal(err)
			}
			return time.Since(start)
		}
	}
	r := testkit.Ratios(b, drain(1), drain(1), drain(64))
	b.ReportMetric(r[0], "one/one")
	b.ReportMetric(r[1], "64/one")
}

// BenchmarkWaiting lists an empty queue, with and without many accepted connections on the
// same port. The kernel lists these connections too.
func BenchmarkWaiting(b *testing.B) {
	for _, accepted := range []int{0, 9000} {
		b.Run(fmt.Sprintf("%d accepted", accepted), func(b *testing.B) {
			ln := listenForStats(b)
			for range accepted {
				for _, open := range []func() (net.Conn, error){
					func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) },
					ln.Accept,
				} {
					c, err := open()
					if err != nil {
						b.Skipf("%v: raise the limit of open files, ulimit -n", err)
					}
					c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
					defer c.Close()
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ln.Waiting(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkControl calls Control of a Listener, with few and with many descriptors open.
func BenchmarkControl(b *testing.B) {
	for _, open := range []int{10, 19000} {
		b.Run(fmt.Sprintf("%d descriptors", open), func(b *testing.B) {
			ln := listenForStats(b)
			raw, err := ln.SyscallConn()
			if err != nil {
				b.Fatal(err)
			}
			for range open {
				fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					b.Skipf("%v: raise the limit of open files, ulimit -n", err)
				}
				defer unix.Close(fd)
			}
			b.ReportAllocs()
			for b.Loop() {
				raw.Control(func(uintptr) {})
			}
		})
	}
}
