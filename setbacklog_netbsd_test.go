package acceptq

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

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

// Listening again lengthens the queue at once, and shortens it without losing connections.
func TestListenAgain(t *testing.T) {
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(1))
	connectQueued(t, ln, 1)
	connectQueued(t, ln, 2)
	require.Equal(t, 6, listenAgain(t, ln, 5).Capacity)
	for queued := 3; queued <= 6; queued++ {
		connectQueued(t, ln, queued)
	}
	require.Equal(t, 3, listenAgain(t, ln, 2).Capacity)
	require.Equal(t, 6, queuedNow(t, ln))
	connectHangs(t, ln)
	bsdAccept(t, ln, 6)
}
