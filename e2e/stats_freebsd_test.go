package e2e

import (
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// listenOn listens on host, which a bare kernel may not have.
func listenOn(t *testing.T, host string, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP(net.JoinHostPort(host, "0"), opts...)
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Skipf("lo0 has no %s here: give it one with ifconfig(8)", host)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// When a queue overflows, the number of connections that survive matches Stats.
func TestOverflowOfFreeBSD(t *testing.T) {
	needCeiling(t, 128)
	needReset(t)
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, row := range []struct{ b, holds int }{{0, 1}, {1, 2}, {2, 4}, {5, 8}, {10, 16}, {128, 193}} {
			if testing.Short() && row.b > 5 {
				continue
			}
			t.Run(host+" "+strconv.Itoa(row.b), func(t *testing.T) {
				ln := listenOn(t, host, acceptq.WithBacklog(row.b))
				var clients []net.Conn
				for len(clients) < row.holds {
					clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
					queuedBecomes(t, len(clients), ln.Stats)
				}
				for range 3 {
					turnedAway(t, ln.Addr())
				}
				want := acceptq.Stats{Queued: row.holds, Limit: row.b, Capacity: row.holds, Drops: sys.Unknown}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				require.Equal(t, row.holds, queueOption(t, ln, unix.SO_LISTENQLEN))
				require.Equal(t, row.b, queueOption(t, ln, unix.SO_LISTENQLIMIT))
				part, known := s.Utilization()
				require.True(t, known)
				require.Equal(t, 1.0, part)
				s, err = acceptq.ReadStats(ln.TCPListener())
				require.NoError(t, err)
				require.Equal(t, want, s)

				for range clients {
					testkit.AcceptAndExchange(t, ln, clients)
				}
				queuedBecomes(t, 0, ln.Stats)
			})
		}
	}
}

// Connections that an accept filter holds back count as Incomplete, not as Queued.
func TestIncompleteOfFreeBSD(t *testing.T) {
	ln := listenFiltered(t, acceptq.WithBacklog(5), acceptq.WithAcceptFilter("dataready", ""))
	var clients []net.Conn
	for range 14 {
		clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
	}
	for _, c := range clients[:8] { // the kernel resets the oldest
		require.NoError(t, c.SetReadDeadline(time.Now().Add(testkit.TooLong)))
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == 0 && s.Incomplete == 6
	}, testkit.TooLong, time.Millisecond)
	require.Equal(t, 6, queueOption(t, ln, unix.SO_LISTENINCQLEN))
	for _, c := range clients[8:] {
		_, err := c.Write([]byte{'x'})
		require.NoError(t, err)
	}
	require.Zero(t, queuedBecomes(t, 6, ln.Stats).Incomplete)
}
