package acceptq

import (
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// When a queue overflows, Stats, the counters of the kernel and the number of failed
// clients agree.
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

// A final ACK that the kernel drops because the queue is full counts twice in Drops,
// and once as an overflow. So Drops does not count clients.
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
				speak(i) // leave the SYN queue, whose limit is also the backlog
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

		// For its retries the sum must hold too.
		speak(3)
		require.Eventually(t, func() bool {
			s, err := ln.Stats()
			overflows := kernelCounter(t, "ListenOverflows")
			return err == nil && overflows > 0 && s.Drops == kernelCounter(t, "TCPDeferAcceptDrop")+2*overflows
		}, 20*time.Second, time.Millisecond)
	})
}

// The kernel does not count the drops of an MPTCP listener, so they are unknown and not 0.
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

// ReadStats reads the queue of a listener from net.Listen, with the ceiling of this
// namespace.
func TestReadStatsOfNetListen(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 3) // the kernel clamps to it, whatever ceiling net has read
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

// gVisor answers TCP_INFO with zeros. Older kernels return a shorter answer or an error. In
// all these cases the queue is unknown, not 0.
func TestQueueThatCannotBeRead(t *testing.T) {
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
			k := realKernel
			k.getsockopt = func(fd, level, option int, p []byte) (int, error) {
				if level == unix.IPPROTO_TCP && option == unix.TCP_INFO {
					return answer(p)
				}
				return realKernel.getsockopt(fd, level, option, p)
			}
			k.readFile = func(string) ([]byte, error) { return []byte("128\n"), nil }
			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			require.Equal(t, Backlog{Requested: 5, Ceiling: 128, Limit: 5, Effective: 5, Capacity: 6}, ln.Backlog())
			connect(t, "tcp", ln.Addr().String())

			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: 5, Capacity: 6}, s, "the limit and capacity come from Backlog")
			_, known := s.Utilization()
			require.False(t, known)

			w, err := k.wrap(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: -1, Ceiling: 128, Limit: unknown, Effective: unknown, Capacity: unknown}, w.Backlog())
			s, err = w.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown}, s)
			b, err := w.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 128, Limit: 9, Effective: 9, Capacity: 10}, b, "the numbers follow the rule")

			require.NoError(t, ln.Close())
			_, err = w.Stats()
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

// The numbers of the kernel are unsigned with 32 bits. They must not overflow an int of 32
// bits.
func TestConnectionsSaturate(t *testing.T) {
	for _, n := range []uint32{0, 1, 4096, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		want := min(uint64(n), math.MaxInt)
		require.EqualValues(t, want, connections(binary.NativeEndian.AppendUint32(nil, n)), "%d", n)
	}
}

// Drops are a kernel counter of 32 bits, and unknown if the kernel does not report it.
func TestDropsThatCannotBeRead(t *testing.T) {
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
		k := realKernel
		k.getsockopt = func(fd, level, option int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && option == unix.SO_MEMINFO {
				return row.answer(p)
			}
			return realKernel.getsockopt(fd, level, option, p)
		}
		ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: row.want}, s, name)
	}
}

// If the protocol of a socket cannot be read, its drops are unknown and all else is known.
func TestProtocolThatCannotBeRead(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	k := realKernel
	k.getsockoptInt = func(fd, level, option int) (int, error) {
		if level == unix.SOL_SOCKET && option == unix.SO_PROTOCOL {
			return 0, unix.ENOPROTOOPT
		}
		return realKernel.getsockoptInt(fd, level, option)
	}
	w, err := k.wrap(ln.TCPListener())
	require.NoError(t, err)
	s, err := w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: unknown}, s)

	k.getsockoptInt = realKernel.getsockoptInt // the protocol is read again
	s, err = w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: 0}, s)
}

// Stats of a listener makes two system calls. The limit is that of the socket, even if
// another holder has changed it.
func TestStatsAsksTheSocket(t *testing.T) {
	k := realKernel
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
	require.NoError(t, err)
	defer ln.Close()
	another := mustWrap(t, ln.TCPListener())
	_, err = another.SetBacklog(3)
	require.NoError(t, err)

	calls := 0
	k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		calls++
		return realKernel.getsockopt(fd, level, name, p)
	}
	k.getsockoptInt = func(fd, level, name int) (int, error) {
		calls++
		return realKernel.getsockoptInt(fd, level, name)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 3, Capacity: 4, Drops: 0}, s)
	require.Equal(t, 2, calls)
}

// If getsockopt fails, the result is an error, not the former contents of the buffer.
func TestGetsockoptFails(t *testing.T) {
	n, err := getsockopt(-1, unix.IPPROTO_TCP, unix.TCP_INFO, make([]byte, infoQueueEnd))
	require.ErrorIs(t, err, unix.EBADF)
	require.Zero(t, n)
}

// A file that is not a socket does not listen.
func TestReadStatsOfAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	defer w.Close()
	_, err = ReadStats(r)
	require.ErrorIs(t, err, syscall.EINVAL)
	require.ErrorIs(t, err, syscall.ENOTSOCK)
}
