package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
)

// Another Listener of the same socket can change the limit. Backlog reads it from the
// socket, as Stats does.
func TestBacklogReadsTheLimit(t *testing.T) {
	ln := listenForStats(t, acceptq.WithBacklog(100))
	if !ln.Backlog().Measured {
		t.Skip("this system does not report the limit")
	}
	other, err := acceptq.Wrap(ln.TCPListener())
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
