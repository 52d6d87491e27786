package e2e

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/testkit"
)

// A drain waits for a connection that an accept filter holds back as long as for a
// handshake in flight. If ctx ends earlier, the error counts the connection.
func TestDrainWaitsForHeldBackConnections(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithAcceptFilter("dataready", ""))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no accept filters here:", err)
	}
	require.NoError(t, err)
	defer ln.Close()
	c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
	require.NoError(t, err)
	defer c.Close()
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Incomplete == 1
	}, testkit.Patience, time.Millisecond)

	var de *acceptq.DrainError
	require.ErrorAs(t, ln.Drain(testkit.Within(t, 100*time.Millisecond)), &de)
	require.Equal(t, 1, de.HeldBack)
	require.Zero(t, de.Queued)

	began := time.Now()
	requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	require.GreaterOrEqual(t, time.Since(began), intake.DrainFlight, "the drain must wait for the silent client")

	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	_, err = c.Write([]byte("data"))
	require.NoError(t, err)
	s, err := ln.Accept()
	require.NoError(t, err)
	defer s.Close()
	requireDrained(t, testkit.Received(t, drained))
}
