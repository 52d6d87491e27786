package acceptq

import (
	"errors"
	"math"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSetBacklogKeepsTheAccount(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	before := ln.Backlog()
	b, err := ln.SetBacklog(7)
	if !systemTells() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, before, b)
		require.Equal(t, before, ln.Backlog())
		return
	}
	require.NoError(t, err)
	require.Equal(t, 7, b.Requested)
	require.Equal(t, b, ln.Backlog())
	require.Equal(t, b.Effective, ln.EffectiveBacklog())
	want, err := PredictBacklog(7)
	require.NoError(t, err)
	require.Equal(t, want.Limit, b.Limit)

	b, err = ln.SetBacklog(math.MinInt)
	require.NoError(t, err)
	require.Equal(t, -1, b.Requested, "as much as the system allows")
	require.Equal(t, b.Ceiling, b.Limit)
}

// SetBacklog is granted the same limit as listening, and loses no queued client.
func TestListeningAgainKeepsTheQueue(t *testing.T) {
	if !systemTells() {
		t.Skip("this system has no second listen, see TestSetBacklogKeepsTheAccount")
	}
	ln := listenForStats(t, WithBacklog(50))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	for _, n := range []int{5, 50, 0, -1, 10, 2} {
		want, err := PredictBacklog(n)
		require.NoError(t, err)
		b, err := ln.SetBacklog(n)
		require.NoError(t, err)
		want.Measured = b.Measured
		require.Equal(t, want, b)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, b.Limit, s.Limit)
		require.Equal(t, b.Capacity, s.Capacity)
		require.Equal(t, 16, s.Queued, "after SetBacklog(%d)", n)
	}
	for range clients {
		acceptAndExchange(t, ln, clients)
	}
	queuedBecomes(t, 0, ln.Stats)
}

// Another Listener of the same socket can change the limit. Backlog reads it from the
// socket, as Stats does.
func TestBacklogReadsTheLimit(t *testing.T) {
	ln := listenForStats(t, WithBacklog(100))
	if !ln.Backlog().Measured {
		t.Skip("this system does not report the limit")
	}
	other, err := Wrap(ln.TCPListener())
	require.NoError(t, err)
	set, err := other.SetBacklog(3)
	require.NoError(t, err)
	require.Equal(t, 100, ln.EffectiveBacklog(), "EffectiveBacklog makes no system call")

	want := set
	want.Requested = 100
	require.Equal(t, want, ln.Backlog())
	require.Equal(t, set.Effective, ln.EffectiveBacklog(), "the value that Backlog has read")
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, 3, s.Limit)
	require.NoError(t, ln.Close())
	require.Equal(t, want, ln.Backlog(), "the last value")
}
