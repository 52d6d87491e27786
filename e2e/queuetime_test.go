package e2e

import (
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// On a system without the time QueueTime returns ErrUnsupported. Bad input gives
// another error.
func TestQueueTimeElsewhere(t *testing.T) {
	ln := listenForStats(t)
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	s, err := ln.Accept()
	require.NoError(t, err)
	defer s.Close()
	d, err := acceptq.QueueTime(s)
	if runtime.GOOS == "linux" || runtime.GOOS == "android" {
		require.NoError(t, err)
		require.GreaterOrEqual(t, d, time.Duration(0))
	} else {
		require.EqualValues(t, -1, d)
		testkit.RequireOp(t, err, "queuetime")
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}
	// The connection must still work.
	_, err = io.WriteString(c, "x")
	require.NoError(t, err)
	_, err = io.ReadFull(s, make([]byte, 1))
	require.NoError(t, err)

	_, err = acceptq.QueueTime(nil)
	testkit.RequireOp(t, err, "queuetime")
	require.ErrorIs(t, err, syscall.EINVAL)
}
