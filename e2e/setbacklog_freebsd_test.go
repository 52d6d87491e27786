package e2e

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// Queued connections stay when the queue is shortened, and new clients get in again
// when it is lengthened. See also TestListenAgain.
func TestListeningAgainWithClientsQueued(t *testing.T) {
	needReset(t)
	ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(10))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	turnedAway(t, ln.Addr())
	_, err := ln.SetBacklog(2)
	require.NoError(t, err)
	turnedAway(t, ln.Addr())
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, acceptq.Stats{Queued: 16, Limit: 2, Capacity: 4, Drops: sys.Unknown}, s)
	_, err = ln.SetBacklog(64)
	require.NoError(t, err)
	clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
	queuedBecomes(t, 17, ln.Stats)
	for range clients {
		testkit.AcceptAndExchange(t, ln, clients)
	}
}

func TestStrictSetBacklogOnFreeBSD(t *testing.T) {
	ceiling := int(needCeiling(t, 128))
	ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(100), acceptq.WithStrictBacklog())
	b, err := ln.SetBacklog(ceiling + 1)
	var clamp *acceptq.ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, ceiling, clamp.Limit)
	require.Equal(t, 100, b.Limit)
	require.Equal(t, 100, queueOption(t, ln, unix.SO_LISTENQLIMIT))
}
