package e2e

import (
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// accept returns the next connection of ln. It has a time limit.
func accept(t *testing.T, ln testkit.TCPListener) *net.TCPConn {
	t.Helper()
	require.NoError(t, ln.SetDeadline(time.Now().Add(20*time.Second)))
	c, err := ln.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, ln.SetDeadline(time.Time{}))
	return c
}

// dialed connects n clients, and waits until all of them are in the queue.
func dialed(t *testing.T, ln *acceptq.Listener, n int) (clients []net.Conn) {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	before := s.Queued
	for range n {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == before+n
	}, testkit.Patience, time.Millisecond)
	return clients
}

// listenForStats listens on loopback until the test ends.
func listenForStats(t testing.TB, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// queuedBecomes waits until the listener reports n queued connections. The handshake of
// a client can end before that of the server.
func queuedBecomes(t testing.TB, n int, stats func() (acceptq.Stats, error)) acceptq.Stats {
	t.Helper()
	var last acceptq.Stats
	var err error
	require.Eventually(t, func() bool {
		last, err = stats()
		return err != nil || last.Queued == n
	}, 20*time.Second, time.Millisecond, "Queued never became %d", n)
	require.NoError(t, err)
	return last
}

func mustWrap(t testing.TB, ln net.Listener) *acceptq.Listener {
	t.Helper()
	w, err := acceptq.Wrap(ln)
	require.NoError(t, err)
	return w
}

// shardsOf returns the shards of s.
func shardsOf(s *acceptq.Shards) []*acceptq.Listener { return slices.Collect(s.All()) }
