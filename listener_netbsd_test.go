package acceptq

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// For a wrapped listener NetBSD reports the length of the queue, but not the limit.
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
