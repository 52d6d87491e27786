package e2e

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// For every request Backlog has the limit that the kernel stored, under the default
// ceiling and under one with more than 16 bits.
func TestBacklogMatchesTheKernel(t *testing.T) {
	requests := []int{math.MinInt, math.MinInt32, -1, 0, 1, 2, 5, 127, 128, 129, 1000, 65536, math.MaxInt32, math.MaxInt}
	for _, ceiling := range []int{128, 100000} {
		t.Run(fmt.Sprintf("ceiling %d", ceiling), func(t *testing.T) {
			setSoacceptqueue(t, ceiling)
			for _, n := range requests {
				limit := n
				if n < 0 || n > ceiling {
					limit = ceiling
				}
				ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(n))
				require.NoError(t, err)
				require.Equal(t, acceptq.Backlog{
					Requested: max(n, -1), Ceiling: ceiling, Limit: limit,
					Effective: 3 * limit / 2, Capacity: 3*limit/2 + 1, Measured: true,
				}, ln.Backlog(), "listen(%d)", n)
				require.Equal(t, 3*limit/2, ln.EffectiveBacklog(), "listen(%d)", n)
				require.Equal(t, limit, queueOption(t, ln, unix.SO_LISTENQLIMIT), "listen(%d)", n)
				require.NoError(t, ln.Close())
			}
		})
	}
}

// A listening socket keeps its limit when the ceiling is raised. Backlog shows the new
// ceiling, and listening again is granted more.
func TestCeilingRaisedAfterListen(t *testing.T) {
	setSoacceptqueue(t, 128)
	ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(1000))
	want := acceptq.Backlog{Requested: 1000, Ceiling: 128, Limit: 128, Effective: 192, Capacity: 193, Measured: true}
	require.Equal(t, want, ln.Backlog())
	require.True(t, ln.Backlog().Clamped())
	_, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(1000), acceptq.WithStrictBacklog())
	var clamp *acceptq.ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, &acceptq.ClampError{
		Requested: 1000, Limit: 128, Ceiling: 128,
		Knob: "kern.ipc.soacceptqueue", Raise: "sysctl kern.ipc.soacceptqueue=1000",
	}, clamp)

	setSoacceptqueue(t, 4096)
	want.Ceiling = 4096
	require.Equal(t, want, ln.Backlog())
	require.Equal(t, 128, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(1000), acceptq.WithStrictBacklog())

	again := listenAgain(t, ln, 1000)
	require.Equal(t, acceptq.Backlog{Requested: 1000, Ceiling: 4096, Limit: 1000, Effective: 1500, Capacity: 1501, Measured: true}, again)
	require.Equal(t, 1000, queueOption(t, ln, unix.SO_LISTENQLIMIT))
}

// If the queue is full, the kernel resets a client after its handshake, so connect may
// succeed or fail. The test counts the connections that survive.
func TestMeasuredCapacity(t *testing.T) {
	for _, tt := range []struct{ limit, held int }{
		{0, 1}, {1, 2}, {2, 4}, {3, 5}, {4, 7}, {5, 8}, {10, 16}, {100, 151}, {128, 193},
	} {
		if testing.Short() && tt.limit > 10 {
			continue
		}
		t.Run(fmt.Sprintf("limit %d", tt.limit), func(t *testing.T) {
			ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(tt.limit), acceptq.WithStrictBacklog())
			require.Equal(t, tt.held, ln.Backlog().Capacity)

			for i := range tt.held + 3 {
				client, err := bsdDial(t, ln)
				if i < tt.held {
					require.NoError(t, err, "client %d", i+1)
					continue
				}
				if err == nil {
					require.NoError(t, client.SetReadDeadline(time.Now().Add(testkit.TooLong)))
					_, err = client.Read(make([]byte, 1))
				}
				require.ErrorIs(t, err, unix.ECONNRESET, "client %d", i+1)
			}

			require.Equal(t, tt.held, queueOption(t, ln, unix.SO_LISTENQLEN))
			bsdAccept(t, ln, tt.held)
			require.Zero(t, queueOption(t, ln, unix.SO_LISTENQLEN), "more than the capacity survived")
		})
	}
}
