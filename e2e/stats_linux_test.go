package e2e

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// When a queue overflows, Stats, the counters of the kernel and the number of failed
// clients agree.
func TestOverflow(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		for _, host := range []string{"127.0.0.1", "[::1]"} {
			for _, b := range []int{0, 1, 5, 128} {
				t.Run(fmt.Sprintf("%s, backlog %d", host, b), func(t *testing.T) {
					overflows, drops := testkit.KernelCounter(t, "ListenOverflows"), testkit.KernelCounter(t, "ListenDrops")
					ln, err := acceptq.ListenTCP(host+":0", acceptq.WithBacklog(b))
					require.NoError(t, err)
					defer ln.Close()
					s, err := ln.Stats()
					require.NoError(t, err)
					require.Equal(t, acceptq.Stats{Incomplete: sys.Unknown, Limit: b, Capacity: b + 1}, s, "before any client")

					clients := fillOneByOne(t, ln, b+1)
					for range 2 {
						require.Nil(t, testkit.ConnectOne(t, ln.Addr()), "the queue is full")
					}

					s, err = ln.Stats()
					require.NoError(t, err)
					require.Equal(t, acceptq.Stats{Queued: b + 1, Incomplete: sys.Unknown, Limit: b, Capacity: b + 1, Drops: 3}, s)
					require.EqualValues(t, 3, testkit.KernelCounter(t, "ListenOverflows")-overflows)
					require.EqualValues(t, s.Drops, testkit.KernelCounter(t, "ListenDrops")-drops)
					part, known := s.Utilization()
					require.True(t, known)
					require.Equal(t, 1.0, part)
					read, err := acceptq.ReadStats(ln.TCPListener())
					require.NoError(t, err)
					require.Equal(t, s, read)
					system, err := acceptq.ReadSystem()
					require.NoError(t, err)
					require.Equal(t, testkit.KernelCounter(t, "ListenOverflows"), system.ListenOverflows)
					require.Equal(t, testkit.KernelCounter(t, "ListenDrops"), system.ListenDrops)

					for range clients {
						testkit.AcceptAndExchange(t, ln, clients)
					}
					s, err = ln.Stats()
					require.NoError(t, err)
					require.Equal(t, acceptq.Stats{Incomplete: sys.Unknown, Limit: b, Capacity: b + 1, Drops: 3}, s)
				})
			}
		}
	})
}

// A final ACK that the kernel drops because the queue is full counts twice in Drops,
// and once as an overflow. So Drops does not count clients.
func TestDropsCountFinalACKsTwice(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(2), acceptq.WithDeferAccept(30*time.Second))
		require.NoError(t, err)
		defer ln.Close()
		var clients []net.Conn
		speak := func(i int) {
			_, err := clients[i].Write([]byte{'x'})
			require.NoError(t, err)
		}
		for i := range 4 {
			clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
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
		require.Zero(t, testkit.KernelCounter(t, "ListenOverflows"))
		require.Equal(t, testkit.KernelCounter(t, "TCPDeferAcceptDrop"), s.Drops, "ACKs without data are dropped too")

		// For its retries the sum must hold too.
		speak(3)
		require.Eventually(t, func() bool {
			s, err := ln.Stats()
			overflows := testkit.KernelCounter(t, "ListenOverflows")
			return err == nil && overflows > 0 && s.Drops == testkit.KernelCounter(t, "TCPDeferAcceptDrop")+2*overflows
		}, 20*time.Second, time.Millisecond)
	})
}

// The kernel does not count the drops of an MPTCP listener, so they are unknown and not 0.
func TestDropsOfMultipathTCPAreUnknown(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		for _, multipath := range []bool{true, false} {
			t.Run(fmt.Sprintf("multipath %v", multipath), func(t *testing.T) {
				var lc net.ListenConfig
				lc.SetMultipathTCP(multipath)
				original, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
				require.NoError(t, err)
				defer original.Close()
				proto := testkit.Option(t, original.(*net.TCPListener), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_PROTOCOL})
				drops := int64(sys.Unknown)
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

				want := acceptq.Stats{Queued: 6, Incomplete: sys.Unknown, Limit: 5, Capacity: 6, Drops: drops}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				s, err = acceptq.ReadStats(original.(*net.TCPListener))
				require.NoError(t, err)
				require.Equal(t, want, s)
				for range clients {
					testkit.AcceptAndExchange(t, original, clients)
				}
			})
		}
	})
}

// ReadStats reads the queue of a listener from net.Listen, with the ceiling of this
// namespace.
func TestReadStatsOfNetListen(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 3) // the kernel clamps to it, whatever ceiling net has read
		ln, err := net.Listen("tcp", "[::1]:0")
		require.NoError(t, err)
		defer ln.Close()
		clients := fillOneByOne(t, ln, 4)
		s, err := acceptq.ReadStats(ln.(*net.TCPListener))
		require.NoError(t, err)
		s.Drops = 0 // unknown or 1, see TestDropsOfMultipathTCPAreUnknown
		require.Equal(t, acceptq.Stats{Queued: 4, Incomplete: sys.Unknown, Limit: 3, Capacity: 4}, s)
		require.Equal(t, acceptq.Backlog{
			Requested: -1, Ceiling: 3, Limit: 3, Effective: 3, Capacity: 4, Measured: true,
		}, mustWrap(t, ln).Backlog())
		for range clients {
			testkit.AcceptAndExchange(t, ln, clients)
		}
	})
}

// If getsockopt fails, the result is an error, not the former contents of the buffer.
func TestGetsockoptFails(t *testing.T) {
	n, err := sys.Getsockopt(-1, unix.IPPROTO_TCP, unix.TCP_INFO, make([]byte, tcpinfo.QueueEnd))
	require.ErrorIs(t, err, unix.EBADF)
	require.Zero(t, n)
}

// A file that is not a socket does not listen.
func TestReadStatsOfAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	defer w.Close()
	_, err = acceptq.ReadStats(r)
	require.ErrorIs(t, err, syscall.EINVAL)
	require.ErrorIs(t, err, syscall.ENOTSOCK)
}
