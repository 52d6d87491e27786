package acceptq

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fillOneByOne connects clients until the queue of ln has its capacity, and sees
// each arrive there before the next comes: at that the kernel is exact. The next
// client must be turned away.
func fillOneByOne(t *testing.T, ln net.Listener, capacity int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < capacity {
		c := connectOne(t, ln.Addr())
		require.NotNil(t, c, "full at %d of %d", len(clients), capacity)
		clients = append(clients, c)
		requireKernelQueue(t, ln.Addr(), len(clients))
	}
	require.Nil(t, connectOne(t, ln.Addr()), "one more than fits")
	return clients
}

func requireKernelQueue(t *testing.T, addr net.Addr, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); kernelQueue(t, addr) != n; <-tick.C {
		require.True(t, time.Now().Before(deadline), "the kernel never had %d queued, but %d", n, kernelQueue(t, addr))
	}
}

// A queue runs over: what the listener says, what the kernel counts and what the
// clients see are one.
func TestOverflow(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		for _, host := range []string{"127.0.0.1", "[::1]"} {
			for _, b := range []int{0, 1, 5, 128} {
				t.Run(fmt.Sprintf("%s, backlog %d", host, b), func(t *testing.T) {
					overflows, drops := kernelCounter(t, "ListenOverflows"), kernelCounter(t, "ListenDrops")
					ln, err := ListenTCP(host+":0", WithBacklog(b))
					require.NoError(t, err)
					defer ln.Close()
					s, err := ln.Stats()
					require.NoError(t, err)
					require.Equal(t, Stats{Incomplete: unknown, Limit: b, Capacity: b + 1}, s, "before any client")

					clients := fillOneByOne(t, ln, b+1)
					for range 2 {
						require.Nil(t, connectOne(t, ln.Addr()), "the queue is full")
					}

					s, err = ln.Stats()
					require.NoError(t, err)
					require.Equal(t, Stats{Queued: b + 1, Incomplete: unknown, Limit: b, Capacity: b + 1, Drops: 3}, s)
					require.EqualValues(t, 3, kernelCounter(t, "ListenOverflows")-overflows)
					require.EqualValues(t, s.Drops, kernelCounter(t, "ListenDrops")-drops)
					part, known := s.Utilization()
					require.True(t, known)
					require.Equal(t, 1.0, part)
					read, err := ReadStats(ln.TCPListener())
					require.NoError(t, err)
					require.Equal(t, s, read)
					system, err := ReadSystem()
					require.NoError(t, err)
					require.Equal(t, kernelCounter(t, "ListenOverflows"), system.ListenOverflows)
					require.Equal(t, kernelCounter(t, "ListenDrops"), system.ListenDrops)

					for range clients {
						acceptAndExchange(t, ln, clients)
					}
					s, err = ln.Stats()
					require.NoError(t, err)
					require.Equal(t, Stats{Incomplete: unknown, Limit: b, Capacity: b + 1, Drops: 3}, s)
				})
			}
		}
	})
}

// A final ACK that meets a full queue counts twice in Drops, and once among the
// overflows: the number is no count of clients.
func TestDropsCountFinalACKsTwice(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(2), WithDeferAccept(30*time.Second))
		require.NoError(t, err)
		defer ln.Close()
		var clients []net.Conn
		speak := func(i int) {
			_, err := clients[i].Write([]byte{'x'})
			require.NoError(t, err)
		}
		for i := range 4 {
			clients = append(clients, connect(t, "tcp", ln.Addr().String()))
			if i < 2 {
				speak(i) // out of the SYN queue, whose limit is the backlog too
				requireKernelQueue(t, ln.Addr(), i+1)
			}
		}
		speak(2)
		requireKernelQueue(t, ln.Addr(), 3)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, 3, s.Queued)
		require.Zero(t, kernelCounter(t, "ListenOverflows"))
		require.Equal(t, kernelCounter(t, "TCPDeferAcceptDrop"), s.Drops, "ACKs without data are dropped too")

		// Its retries come to the same sum.
		speak(3)
		require.Eventually(t, func() bool {
			s, err := ln.Stats()
			overflows := kernelCounter(t, "ListenOverflows")
			return err == nil && overflows > 0 && s.Drops == kernelCounter(t, "TCPDeferAcceptDrop")+2*overflows
		}, 20*time.Second, time.Millisecond)
	})
}

// Drops of an MPTCP listener do not move, so they are unknown and not 0.
func TestDropsOfMultipathTCPAreUnknown(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		for _, multipath := range []bool{true, false} {
			t.Run(fmt.Sprintf("multipath %v", multipath), func(t *testing.T) {
				var lc net.ListenConfig
				lc.SetMultipathTCP(multipath)
				original, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
				require.NoError(t, err)
				defer original.Close()
				proto := option(t, original.(*net.TCPListener), socketOption{unix.SOL_SOCKET, unix.SO_PROTOCOL})
				drops := int64(unknown)
				switch proto {
				case unix.IPPROTO_MPTCP:
					require.True(t, multipath)
				case unix.IPPROTO_TCP:
					drops = 1
					if multipath {
						t.Log("this kernel has no MPTCP: net.Listen made a plain TCP socket")
					}
				default:
					t.Fatalf("protocol %d", proto)
				}

				ln := mustWrap(t, original)
				b, err := ln.SetBacklog(5)
				require.NoError(t, err)
				require.True(t, b.Measured)
				require.Equal(t, 5, b.Limit)
				clients := fillOneByOne(t, original, 6)

				want := Stats{Queued: 6, Incomplete: unknown, Limit: 5, Capacity: 6, Drops: drops}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				s, err = ReadStats(original.(*net.TCPListener))
				require.NoError(t, err)
				require.Equal(t, want, s)
				for range clients {
					acceptAndExchange(t, original, clients)
				}
			})
		}
	})
}

// The queue of net.Listen's listener, with the ceiling of this namespace.
func TestReadStatsOfNetListen(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 3) // whatever net has read, the kernel clamps to it
		ln, err := net.Listen("tcp", "[::1]:0")
		require.NoError(t, err)
		defer ln.Close()
		clients := fillOneByOne(t, ln, 4)
		s, err := ReadStats(ln.(*net.TCPListener))
		require.NoError(t, err)
		s.Drops = 0 // unknown or 1, see TestDropsOfMultipathTCPAreUnknown
		require.Equal(t, Stats{Queued: 4, Incomplete: unknown, Limit: 3, Capacity: 4}, s)
		require.Equal(t, Backlog{
			Requested: -1, Ceiling: 3, Limit: 3, Effective: 3, Capacity: 4, Measured: true,
		}, mustWrap(t, ln).Backlog())
		for range clients {
			acceptAndExchange(t, ln, clients)
		}
	})
}

// The queue grows and shrinks under the clients that wait in it, and loses none.
func TestSetBacklogLosesNobody(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(5))
		require.NoError(t, err)
		defer ln.Close()
		resize := func(n, queued int) {
			t.Helper()
			b, err := ln.SetBacklog(n)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: n, Ceiling: 4096, Limit: n, Effective: n, Capacity: n + 1, Measured: true}, b)
			require.Equal(t, b, ln.Backlog())
			require.Equal(t, n, ln.EffectiveBacklog())
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, n, s.Limit)
			require.Equal(t, queued, s.Queued)
			require.Equal(t, queued, kernelQueue(t, ln.Addr()))
		}
		setSysctl(t, "net.core.somaxconn", 4096)
		clients := fillOneByOne(t, ln, 6)
		resize(50, 6)
		for len(clients) < 20 {
			c := connectOne(t, ln.Addr())
			require.NotNil(t, c, "the queue has grown")
			clients = append(clients, c)
			requireKernelQueue(t, ln.Addr(), len(clients))
		}
		resize(2, 20)
		require.Nil(t, connectOne(t, ln.Addr()), "20 wait where 3 fit")

		for left := 20; left > 3; left-- {
			acceptAndExchange(t, ln, clients)
		}
		require.Nil(t, connectOne(t, ln.Addr()), "3 wait where 3 fit")
		acceptAndExchange(t, ln, clients)
		late := connectOne(t, ln.Addr())
		require.NotNil(t, late, "2 wait where 3 fit")
		requireKernelQueue(t, ln.Addr(), 3)
		clients = append(clients, late)
		resize(0, 3)
		resize(1, 3)
		for range 3 {
			acceptAndExchange(t, ln, clients)
		}
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Zero(t, s.Queued, "all were delivered")
	})
}

// A ceiling that was raised helps a listener at once when it asks again.
func TestSetBacklogAfterTheCeilingWasRaised(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 3)
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(4096))
		require.NoError(t, err)
		defer ln.Close()
		clients := fillOneByOne(t, ln, 4)
		setSysctl(t, "net.core.somaxconn", 196602)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, 3, s.Limit, "a listening socket keeps its limit")
		require.Equal(t, 3, ln.EffectiveBacklog())
		require.Contains(t, ln.Backlog().String(), "SetBacklog(4096)")

		b, err := ln.SetBacklog(4096)
		require.NoError(t, err)
		require.Equal(t, Backlog{
			Requested: 4096, Ceiling: 196602, Limit: 4096, Effective: 4096, Capacity: 4097, Measured: true,
		}, b)
		clients = append(clients, connectOne(t, ln.Addr()))
		requireKernelQueue(t, ln.Addr(), 5)
		b, err = ln.SetBacklog(-1)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit, "no 16 bits anywhere")
		b, err = ln.SetBacklog(math.MaxInt)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit)
		require.True(t, b.Clamped())
		for range clients {
			acceptAndExchange(t, ln, clients)
		}
	})
}

// A strict listener is left as it was when it would get less than it asks.
func TestStrictSetBacklogKeepsTheLimit(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 16)
		const command = "sysctl -w net.core.somaxconn=17"
		keeps := func(t *testing.T, ln *Listener, ceiling int, raise string) {
			t.Helper()
			before := ln.Backlog()
			b, err := ln.SetBacklog(17)
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.Equal(t, ClampError{
				Requested: 17, Limit: 16, Ceiling: ceiling,
				Knob: "net.core.somaxconn", Raise: raise,
			}, *clamp)
			requireOp(t, err, "listen")
			require.Equal(t, before, b)
			require.Equal(t, before, ln.Backlog())
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, before.Limit, s.Limit, "the kernel's own word")
		}
		listen := func(t *testing.T, sys *system, n int) *Listener {
			t.Helper()
			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n), WithStrictBacklog()})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			return ln
		}
		t.Run("by prediction", func(t *testing.T) {
			calls := 0
			sys := realSystem
			sys.listenCall = func(fd, n int) error { calls++; return realSystem.listenCall(fd, n) }
			ln := listen(t, &sys, 8)
			calls = 0
			keeps(t, ln, 16, command)
			require.Zero(t, calls, "the socket is not touched")
			b, err := ln.SetBacklog(16)
			require.NoError(t, err)
			require.Equal(t, 16, b.Limit)
			keeps(t, ln, 16, command)
			b, err = ln.SetBacklog(-1)
			require.NoError(t, err, "as much as allowed is never too little")
			require.Equal(t, 16, b.Limit)
		})
		t.Run("by read-back, where the ceiling cannot be read", func(t *testing.T) {
			var calls []int
			sys := realSystem
			sys.listenCall = func(fd, n int) error { calls = append(calls, n); return realSystem.listenCall(fd, n) }
			sys.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			ln := listen(t, &sys, 8)
			calls = nil
			keeps(t, ln, unknown, command)
			require.Equal(t, []int{17, 8}, calls, "there and back")
			b, err := ln.SetBacklog(16)
			require.NoError(t, err)
			require.Equal(t, 16, b.Limit)
		})
		t.Run("by read-back, where no number was asked and the ceiling moved", func(t *testing.T) {
			sys := realSystem
			sys.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			ln := listen(t, &sys, -1)
			before := ln.Backlog()
			require.Equal(t, []int{-1, 16}, []int{before.Requested, before.Limit})
			defer setSysctl(t, "net.core.somaxconn", 16)
			for ceiling, limit := range map[int]int{1000: 16, 16: 16, 9: 9} { // a lower one cannot be undone
				setSysctl(t, "net.core.somaxconn", 16)
				_, err := ln.SetBacklog(-1)
				require.NoError(t, err)
				setSysctl(t, "net.core.somaxconn", ceiling)
				b, err := ln.SetBacklog(1001)
				var clamp *ClampError
				require.ErrorAs(t, err, &clamp)
				require.Equal(t, ceiling, clamp.Limit)
				want := Backlog{Requested: -1, Ceiling: unknown, Limit: limit, Effective: limit, Capacity: limit + 1, Measured: true}
				require.Equal(t, want, b)
				require.Equal(t, want, ln.Backlog())
				s, err := ReadStats(ln.TCPListener())
				require.NoError(t, err)
				require.Equal(t, limit, s.Limit, "the kernel's own word")
			}
		})
		t.Run("by read-back, where the file lies", func(t *testing.T) {
			sys := realSystem
			sys.readFile = func(string) ([]byte, error) { return []byte("4096\n"), nil }
			keeps(t, listen(t, &sys, 8), 4096, "") // what it says would do
		})
		t.Run("nothing can be read any more", func(t *testing.T) {
			sys := realSystem
			ln := listen(t, &sys, 8)
			sys.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			sys.getsockopt = func(int, int, int, []byte) (int, error) { return 0, syscall.EPERM }
			setSysctl(t, "net.core.somaxconn", 1000)
			defer setSysctl(t, "net.core.somaxconn", 16)
			for range 2 { // at the second there is no known limit to go back to
				b, err := ln.SetBacklog(16)
				require.ErrorIs(t, err, errors.ErrUnsupported)
				require.Equal(t, unknown, b.Limit)
			}
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, 16, s.Limit, "never the ceiling, by taking unknown for a request")
		})
		t.Run("the way back is shut", func(t *testing.T) {
			sys := realSystem
			sys.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			ln := listen(t, &sys, 8)
			sys.listenCall = func(fd, n int) error {
				if n == 8 {
					return syscall.EINVAL
				}
				return realSystem.listenCall(fd, n)
			}
			_, err := ln.SetBacklog(17)
			require.ErrorIs(t, err, syscall.EINVAL)
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, 16, s.Limit)
			require.Equal(t, s.Limit, ln.Backlog().Limit, "the account is the truth all the same")
		})
	})
}

// gVisor answers TCP_INFO with zeros, older kernels with less or not at all. None
// of that is a queue of 0.
func TestQueueThatIsNotTold(t *testing.T) {
	answers := map[string]func(p []byte) (int, error){
		"zeros":   func(p []byte) (int, error) { clear(p); return len(p), nil },
		"too few": func(p []byte) (int, error) { p[0] = tcpListen; return infoQueueEnd - 1, nil },
		"refused": func([]byte) (int, error) { return 0, unix.EOPNOTSUPP },
		"another state": func(p []byte) (int, error) {
			p[infoState] = 1
			binary.NativeEndian.PutUint32(p[infoUnacked:], 7)
			return len(p), nil
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			sys := realSystem
			sys.getsockopt = func(fd, level, option int, p []byte) (int, error) {
				if level == unix.IPPROTO_TCP && option == unix.TCP_INFO {
					return answer(p)
				}
				return realSystem.getsockopt(fd, level, option, p)
			}
			sys.readFile = func(string) ([]byte, error) { return []byte("128\n"), nil }
			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			require.Equal(t, Backlog{Requested: 5, Ceiling: 128, Limit: 5, Effective: 5, Capacity: 6}, ln.Backlog())
			connect(t, "tcp", ln.Addr().String())

			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: 5, Capacity: 6}, s, "the rest is of the account")
			_, known := s.Utilization()
			require.False(t, known)

			w, err := sys.wrap(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: -1, Ceiling: 128, Limit: unknown, Effective: unknown, Capacity: unknown}, w.Backlog())
			s, err = w.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown}, s)
			b, err := w.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 128, Limit: 9, Effective: 9, Capacity: 10}, b, "by the rule")

			require.NoError(t, ln.Close())
			_, err = w.Stats()
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

// The kernel's numbers have 32 bits without a sign; an int may have 32 with one.
func TestConnectionsSaturate(t *testing.T) {
	for _, n := range []uint32{0, 1, 4096, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		want := uint64(n)
		if want > math.MaxInt {
			want = math.MaxInt
		}
		require.EqualValues(t, want, connections(binary.NativeEndian.AppendUint32(nil, n)), "%d", n)
	}
}

// Drops are the kernel's 32 bits, and unknown where it does not tell.
func TestDropsThatAreNotTold(t *testing.T) {
	for name, row := range map[string]struct {
		answer func(p []byte) (int, error)
		want   int64
	}{
		"refused": {func([]byte) (int, error) { return 0, unix.ENOPROTOOPT }, unknown},
		"too few": {func(p []byte) (int, error) { return memInfoEnd - 1, nil }, unknown},
		"the largest": {func(p []byte) (int, error) {
			binary.NativeEndian.PutUint32(p[memInfoDrops:], math.MaxUint32)
			return memInfoEnd, nil
		}, math.MaxUint32},
	} {
		sys := realSystem
		sys.getsockopt = func(fd, level, option int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && option == unix.SO_MEMINFO {
				return row.answer(p)
			}
			return realSystem.getsockopt(fd, level, option, p)
		}
		ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: row.want}, s, name)
	}
}

// A socket whose protocol cannot be asked for has unknown drops, and all else.
func TestProtocolThatIsNotTold(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	sys := realSystem
	sys.getsockoptInt = func(fd, level, option int) (int, error) {
		if level == unix.SOL_SOCKET && option == unix.SO_PROTOCOL {
			return 0, unix.ENOPROTOOPT
		}
		return realSystem.getsockoptInt(fd, level, option)
	}
	w, err := sys.wrap(ln.TCPListener())
	require.NoError(t, err)
	s, err := w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: unknown}, s)

	sys.getsockoptInt = realSystem.getsockoptInt // it is asked for again
	s, err = w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: 0}, s)
}

// Stats of a listener makes two system calls, and the limit in them is the socket's,
// whoever has set it.
func TestStatsAsksTheSocket(t *testing.T) {
	sys := realSystem
	ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
	require.NoError(t, err)
	defer ln.Close()
	another := mustWrap(t, ln.TCPListener())
	_, err = another.SetBacklog(3)
	require.NoError(t, err)

	calls := 0
	sys.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		calls++
		return realSystem.getsockopt(fd, level, name, p)
	}
	sys.getsockoptInt = func(fd, level, name int) (int, error) {
		calls++
		return realSystem.getsockoptInt(fd, level, name)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 3, Capacity: 4, Drops: 0}, s)
	require.Equal(t, 2, calls)
}

// A refused getsockopt is an error, and not what the buffer held before.
func TestGetsockoptFails(t *testing.T) {
	n, err := getsockopt(-1, unix.IPPROTO_TCP, unix.TCP_INFO, make([]byte, infoQueueEnd))
	require.ErrorIs(t, err, unix.EBADF)
	require.Zero(t, n)
}

func TestReadSystem(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		counters := func() (n [4]int64) {
			for i, name := range []string{"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies"} {
				n[i] = kernelCounter(t, name)
			}
			return n
		}
		read := func() System {
			t.Helper()
			before := counters()
			s, err := ReadSystem()
			require.NoError(t, err)
			after := counters()
			for i, got := range []int64{s.ListenOverflows, s.ListenDrops, s.ReqQFullDrop, s.ReqQFullDoCookies} {
				require.GreaterOrEqual(t, got, before[i])
				require.LessOrEqual(t, got, after[i])
			}
			for name, got := range map[string]int{
				"core/somaxconn":             s.Ceiling,
				"ipv4/tcp_max_syn_backlog":   s.SYNBacklog,
				"ipv4/tcp_syncookies":        s.SYNCookies,
				"ipv4/tcp_abort_on_overflow": s.AbortOnOverflow,
				"ipv4/tcp_migrate_req":       s.MigrateRequests,
			} {
				text, err := os.ReadFile("/proc/sys/net/" + name)
				require.NoError(t, err)
				require.Equal(t, strings.TrimSpace(string(text)), strconv.Itoa(got), name)
			}
			return s
		}
		require.Equal(t, "net.core.somaxconn", read().Knob)
		setSysctl(t, "net.core.somaxconn", 77)
		setSysctl(t, "net.ipv4.tcp_max_syn_backlog", 4321)
		setSysctl(t, "net.ipv4.tcp_syncookies", 2)
		setSysctl(t, "net.ipv4.tcp_abort_on_overflow", 1)
		setSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		require.Equal(t, System{
			Ceiling: 77, Knob: "net.core.somaxconn", SYNBacklog: 4321, SYNCookies: 2, AbortOnOverflow: 1, MigrateRequests: 1,
		}, read(), "nothing of the first reading is kept")

		// Each counter by what moves it.
		setSysctl(t, "net.ipv4.tcp_syncookies", 1)
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(0))
		require.NoError(t, err)
		defer ln.Close()
		fillOneByOne(t, ln, 1)
		s := read()
		require.EqualValues(t, 1, s.ListenOverflows)
		require.EqualValues(t, 1, s.ListenDrops)
		require.Zero(t, s.ReqQFullDrop)
		require.Zero(t, s.ReqQFullDoCookies)

		require.Zero(t, fillSYNQueue(t, func() bool { return read().ReqQFullDoCookies > 0 }).ReqQFullDrop)
		setSysctl(t, "net.ipv4.tcp_syncookies", 0)
		cookies := read().ReqQFullDoCookies
		require.Equal(t, cookies, fillSYNQueue(t, func() bool { return read().ReqQFullDrop > 0 }).ReqQFullDoCookies)
	})
}

// fillSYNQueue starts one handshake more than a SYN queue has room for, whose
// limit is the backlog too, until full says so. The listener holds them back.
func fillSYNQueue(t *testing.T, full func() bool) System {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(1), WithDeferAccept(30*time.Second))
	require.NoError(t, err)
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	for range 3 { // kernels before 2025 hold one, those since then two
		clients.Go(func() {
			if c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String()); err == nil {
				<-ctx.Done()
				c.Close()
			}
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !full() {
		require.NoError(t, ctx.Err(), "the SYN queue never was full")
		<-tick.C
	}
	s, err := ReadSystem()
	require.NoError(t, err)
	return s
}

// What cannot be read is unknown, one by one, and no failure.
func TestReadSystemWithoutFiles(t *testing.T) {
	whole := map[string]string{
		"/proc/sys/net/core/somaxconn":             "4096\n",
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   "2048\n",
		"/proc/sys/net/ipv4/tcp_syncookies":        "1\n",
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": "0\n",
		"/proc/sys/net/ipv4/tcp_migrate_req":       "1\n",
		"/proc/thread-self/net/netstat": "TcpExt: SyncookiesSent ListenOverflows ListenDrops TCPReqQFullDoCookies TCPReqQFullDrop\n" +
			"TcpExt: 9 11 12 13 14\n",
	}
	all := System{
		Ceiling: 4096, Knob: "net.core.somaxconn", SYNBacklog: 2048, SYNCookies: 1, AbortOnOverflow: 0, MigrateRequests: 1,
		ListenOverflows: 11, ListenDrops: 12, ReqQFullDrop: 14, ReqQFullDoCookies: 13,
	}
	without := map[string]func(*System){
		"":                                         func(*System) {},
		"/proc/sys/net/core/somaxconn":             func(s *System) { s.Ceiling = unknown },
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   func(s *System) { s.SYNBacklog = unknown },
		"/proc/sys/net/ipv4/tcp_syncookies":        func(s *System) { s.SYNCookies = unknown },
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": func(s *System) { s.AbortOnOverflow = unknown },
		"/proc/sys/net/ipv4/tcp_migrate_req":       func(s *System) { s.MigrateRequests = unknown },
		"/proc/thread-self/net/netstat": func(s *System) {
			s.ListenOverflows, s.ListenDrops, s.ReqQFullDrop, s.ReqQFullDoCookies = unknown, unknown, unknown, unknown
		},
	}
	for missing, forget := range without {
		for _, garbage := range []string{"", "\n", "-1\n", "many\n"} {
			sys := realSystem
			sys.readFile = func(name string) ([]byte, error) {
				text, ok := whole[name]
				switch {
				case !ok:
					t.Errorf("an unexpected file: %s", name)
					return nil, fs.ErrNotExist
				case name != missing:
					return []byte(text), nil
				case garbage == "":
					return nil, fs.ErrPermission
				}
				return []byte(garbage), nil
			}
			want := all
			forget(&want)
			got, err := sys.readSystem()
			require.NoError(t, err)
			require.Equal(t, want, got, "without %q, %q instead", missing, garbage)
		}
	}
	sys := realSystem
	sys.readFile = func(string) ([]byte, error) { return nil, fs.ErrNotExist }
	want := all
	for _, forget := range without {
		forget(&want)
	}
	got, err := sys.readSystem()
	require.NoError(t, err)
	require.Equal(t, want, got)
}
