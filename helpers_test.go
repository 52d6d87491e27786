package acceptq

import (
	"errors"
	"math"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/testkit"
)

var (
	_ testkit.TCPListener = (*net.TCPListener)(nil)
	_ testkit.TCPListener = (*Listener)(nil)
)

// most is the capacity for the largest argument of listen(2), capped to int.
var most = saturate(math.MaxInt32 + 1)

// beyond is a number whose lower 32 bits, which listen(2) uses, are 5; capped to int.
var beyond = saturate(1<<32 + 5)

// rounds returns a fifth of n, at least 1. With ACCEPTQ_ROUNDS=5 it returns n, the number of
// rounds that makes a test sure to find what it looks for.
func rounds(n int) int { return max(n*testkit.Factor()/5, 1) }

// dialed connects n clients, and waits until all of them are in the queue.
func dialed(t *testing.T, ln *Listener, n int) (clients []net.Conn) {
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

// requireListenError checks the form of the error of a failed Listen.
func requireListenError(t *testing.T, ln *Listener, err error) {
	t.Helper()
	require.Nil(t, ln)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	require.Equal(t, "tcp", op.Net)
}

// systemTells reports whether the accept queue can be read on this system.
func systemTells() bool {
	_, known := ruleOf(runtime.GOOS)
	return known
}

// listenForStats listens on loopback until the test ends.
func listenForStats(t testing.TB, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// queuedBecomes waits until the listener reports n queued connections. The handshake of
// a client can end before that of the server.
func queuedBecomes(t testing.TB, n int, stats func() (Stats, error)) Stats {
	t.Helper()
	var last Stats
	var err error
	require.Eventually(t, func() bool {
		last, err = stats()
		return err != nil || last.Queued == n
	}, 20*time.Second, time.Millisecond, "Queued never became %d", n)
	require.NoError(t, err)
	return last
}

func mustWrap(t testing.TB, ln net.Listener) *Listener {
	t.Helper()
	w, err := Wrap(ln)
	require.NoError(t, err)
	return w
}

// requireClosed requires the error of a closed socket. On a system that reports nothing
// about sockets the error may be ErrUnsupported instead: net on js does not know which
// sockets are closed.
func requireClosed(t *testing.T, err error) {
	t.Helper()
	if !systemTells() && errors.Is(err, errors.ErrUnsupported) {
		return
	}
	require.ErrorIs(t, err, net.ErrClosed)
}

// unknownStats is a Stats without a known number.
var unknownStats = Stats{Queued: -1, Incomplete: -1, Limit: -1, Capacity: -1, Drops: -1}

// shardsOf returns the shards of s.
func shardsOf(s *Shards) []*Listener { return slices.Collect(s.All()) }

func TestMain(m *testing.M) { testkit.Main(m) }
