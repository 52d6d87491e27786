package e2e

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// For a wrapped listener NetBSD reports the length of the queue, but not the limit.
func TestWrapOnNetBSD(t *testing.T) {
	original, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer original.Close()
	ln, err := acceptq.Wrap(original)
	require.NoError(t, err)
	testkit.Connect(t, "tcp", ln.Addr().String())
	require.Equal(t,
		acceptq.Stats{Queued: 1, Incomplete: sys.Unknown, Limit: sys.Unknown, Capacity: sys.Unknown, Drops: sys.Unknown},
		queuedBecomes(t, 1, ln.Stats))
	b, err := ln.SetBacklog(7)
	require.NoError(t, err)
	require.Equal(t, 7, b.Limit)
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, acceptq.Stats{Queued: 1, Incomplete: sys.Unknown, Limit: 7, Capacity: 8, Drops: sys.Unknown}, s)
}
