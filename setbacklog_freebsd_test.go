package acceptq

import (
	"errors"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Queued connections stay when the queue is shortened, and new clients get in again
// when it is lengthened. See also TestListenAgain.
func TestListeningAgainWithClientsQueued(t *testing.T) {
	needReset(t)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(10))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	turnedAway(t, ln.Addr())
	_, err := ln.SetBacklog(2)
	require.NoError(t, err)
	turnedAway(t, ln.Addr())
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Queued: 16, Limit: 2, Capacity: 4, Drops: unknown}, s)
	_, err = ln.SetBacklog(64)
	require.NoError(t, err)
	clients = append(clients, connect(t, "tcp", ln.Addr().String()))
	queuedBecomes(t, 17, ln.Stats)
	for range clients {
		acceptAndExchange(t, ln, clients)
	}
}

func TestStrictSetBacklogOnFreeBSD(t *testing.T) {
	ceiling := int(needCeiling(t, 128))
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(100), WithStrictBacklog())
	b, err := ln.SetBacklog(ceiling + 1)
	var clamp *ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, ceiling, clamp.Limit)
	require.Equal(t, 100, b.Limit)
	require.Equal(t, 100, queueOption(t, ln, unix.SO_LISTENQLIMIT))
}

// Listening again lengthens and shortens the queue at once.
func TestListenAgain(t *testing.T) {
	ceiling, _, err := realKernel.bounds()
	require.NoError(t, err)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(5))
	for _, step := range []struct{ n, limit int }{{50, 50}, {0, 0}, {-1, ceiling}, {10, 10}} {
		account := listenAgain(t, ln, step.n)
		require.Equal(t, step.limit, account.Limit)
		require.Equal(t, step.limit, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	}
}

// A shorter queue would also reduce the number of WithFastOpen. SetBacklog returns an
// error and changes nothing.
func TestSetBacklogKeepsFastOpen(t *testing.T) {
	k := willing()
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(10), WithFastOpen(5)})
	require.NoError(t, err)
	defer ln.Close()
	before := ln.Backlog()
	b, err := ln.SetBacklog(4)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "WithFastOpen(5): granted 2")
	require.Equal(t, before, b)
	require.Equal(t, 10, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	b, err = ln.SetBacklog(11)
	require.NoError(t, err)
	require.Equal(t, 11, b.Limit)
}
