package acceptq

import (
	"errors"
	"net"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A queue runs over. Clients that come one at a time find room for one more than
// the limit; bursts, which find more, are not for this test.
func TestOverflowOfNetBSD(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, b := range []int{0, 1, 2, 5, 10, 128} {
			if testing.Short() && b > 2 {
				continue
			}
			t.Run(host+" "+strconv.Itoa(b), func(t *testing.T) {
				ln, err := ListenTCP(net.JoinHostPort(host, "0"), WithBacklog(b))
				if errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Skipf("lo0 has no %s here: give it one with ifconfig(8)", host)
				}
				require.NoError(t, err)
				defer ln.Close()
				var clients []net.Conn
				for len(clients) < b+1 {
					clients = append(clients, connect(t, "tcp", ln.Addr().String()))
					queuedBecomes(t, len(clients), ln.Stats)
				}
				connectHangs(t, ln)

				want := Stats{Queued: b + 1, Incomplete: unknown, Limit: b, Capacity: b + 1, Drops: unknown}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				require.Equal(t, b+1, queuedNow(t, ln))
				part, known := s.Utilization()
				require.True(t, known)
				require.Equal(t, 1.0, part)
				want.Limit, want.Capacity = unknown, unknown // no socket option tells them
				s, err = ReadStats(ln.TCPListener())
				require.NoError(t, err)
				require.Equal(t, want, s)

				for left := len(clients); left > 0; left-- {
					queuedBecomes(t, left, ln.Stats)
					acceptAndExchange(t, ln, clients)
				}
				queuedBecomes(t, 0, ln.Stats)
			})
		}
	}
}

func TestListeningAgainOnNetBSD(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	for _, row := range []struct{ n, limit int }{{5, 5}, {50, 50}, {0, 0}, {-1, 128}, {10, 10}, {1000, 128}, {50, 50}} {
		b, err := ln.SetBacklog(row.n)
		require.NoError(t, err)
		require.Equal(t, Backlog{
			Requested: row.n, Ceiling: 128, Limit: row.limit, Effective: row.limit, Capacity: row.limit + 1,
		}, b)
	}
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	_, err := ln.SetBacklog(2)
	require.NoError(t, err)
	connectHangs(t, ln)
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Queued: 16, Incomplete: unknown, Limit: 2, Capacity: 3, Drops: unknown}, s)
	_, err = ln.SetBacklog(64)
	require.NoError(t, err)
	clients = append(clients, connect(t, "tcp", ln.Addr().String()))
	queuedBecomes(t, 17, ln.Stats)
	for range clients {
		acceptAndExchange(t, ln, clients)
	}
}

// A listener that was adopted is known by its queue, and not by its limit.
func TestWrapOnNetBSD(t *testing.T) {
	original, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer original.Close()
	ln := mustWrap(t, original)
	connect(t, "tcp", ln.Addr().String())
	require.Equal(t,
		Stats{Queued: 1, Incomplete: unknown, Limit: unknown, Capacity: unknown, Drops: unknown},
		queuedBecomes(t, 1, ln.Stats))
	b, err := ln.SetBacklog(7)
	require.NoError(t, err)
	require.Equal(t, 7, b.Limit)
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Queued: 1, Incomplete: unknown, Limit: 7, Capacity: 8, Drops: unknown}, s)
}

// What the kernel refuses is an error, and no number of connections.
func TestKqueueOfNoListener(t *testing.T) {
	before := openDescriptors()
	n, err := readable(-1)
	require.ErrorIs(t, err, unix.EBADF)
	require.Equal(t, unknown, n)
	require.Equal(t, before, openDescriptors())
}

func TestReadSystemOfNetBSD(t *testing.T) {
	s, err := ReadSystem()
	require.NoError(t, err)
	require.Equal(t, System{
		Ceiling: 128, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
		ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
	}, s)
}
