package e2e

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestListeningAgainOnNetBSD(t *testing.T) {
	ln := listenForStats(t, acceptq.WithBacklog(5))
	for _, row := range []struct{ n, limit int }{{5, 5}, {50, 50}, {0, 0}, {-1, 128}, {10, 10}, {1000, 128}, {50, 50}} {
		b, err := ln.SetBacklog(row.n)
		require.NoError(t, err)
		require.Equal(t, acceptq.Backlog{
			Requested: row.n, Ceiling: 128, Limit: row.limit, Effective: row.limit, Capacity: row.limit + 1,
		}, b)
	}
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	_, err := ln.SetBacklog(2)
	require.NoError(t, err)
	connectHangs(t, ln)
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, acceptq.Stats{Queued: 16, Incomplete: sys.Unknown, Limit: 2, Capacity: 3, Drops: sys.Unknown}, s)
	_, err = ln.SetBacklog(64)
	require.NoError(t, err)
	clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
	queuedBecomes(t, 17, ln.Stats)
	for range clients {
		testkit.AcceptAndExchange(t, ln, clients)
	}
}
