//go:build darwin || dragonfly || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// A process without a descriptor cannot open the kqueue that Stats needs. A drain tries
// again until ctx ends, and does not report an unread queue as empty.
func TestDrainWithoutADescriptor(t *testing.T) {
	var full atomic.Bool
	k := sys.Real
	k.Readable = func(fd int) (int, error) {
		if full.Load() {
			return unknown, os.NewSyscallError("kqueue", unix.EMFILE)
		}
		return sys.Real.Readable(fd)
	}
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", nil)
	require.NoError(t, err)
	defer ln.Close()
	dialed(t, ln, 3)

	full.Store(true)
	err = ln.Drain(testkit.Within(t, 100*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, unknown, de.Queued)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, err, unix.EMFILE)
	require.False(t, errors.Is(err, ErrStillOpen))

	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	require.Never(t, func() bool { return len(drained) > 0 }, 50*time.Millisecond, time.Millisecond)
	full.Store(false)
	for range 3 {
		c, err := ln.Accept()
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()
	requireDrained(t, testkit.Received(t, drained))
}
