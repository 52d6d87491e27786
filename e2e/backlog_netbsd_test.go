package e2e

import (
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
)

// The ceiling is compiled in. A negative number, which the kernel treats as 0, is not
// passed to it.
func TestBacklogFollowsTheRule(t *testing.T) {
	for _, tt := range []struct{ n, limit int }{
		{math.MinInt, 128}, {-1, 128}, {0, 0}, {1, 1}, {5, 5}, {127, 127}, {128, 128},
		{129, 128}, {1000, 128}, {32768, 128}, {65541, 128}, {math.MaxInt32, 128}, {math.MaxInt, 128},
	} {
		ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(tt.n))
		require.Equal(t, acceptq.Backlog{
			Requested: max(tt.n, -1), Ceiling: 128, Limit: tt.limit,
			Effective: tt.limit, Capacity: tt.limit + 1,
		}, ln.Backlog(), "listen(%d)", tt.n)
	}
}

func TestStrictNamesNoKnob(t *testing.T) {
	_, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(129), acceptq.WithStrictBacklog())
	var clamp *acceptq.ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, &acceptq.ClampError{Requested: 129, Limit: 128, Ceiling: 128}, clamp)
}

// Clients that connect one at a time fill the queue up to the capacity. The kernel
// drops the SYN of the next client, which hangs.
func TestMeasuredCapacity(t *testing.T) {
	for _, tt := range []struct{ n, held int }{
		{0, 1}, {1, 2}, {2, 3}, {5, 6}, {10, 11}, {128, 129}, {1000, 129}, {-1, 129},
	} {
		if testing.Short() && tt.held > 6 {
			continue
		}
		t.Run(fmt.Sprintf("listen(%d)", tt.n), func(t *testing.T) {
			ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(tt.n))
			require.Equal(t, tt.held, ln.Backlog().Capacity)

			for i := range tt.held {
				connectQueued(t, ln, i+1)
			}
			connectHangs(t, ln)
			require.Equal(t, tt.held, queuedNow(t, ln))
			bsdAccept(t, ln, tt.held)
			require.Zero(t, queuedNow(t, ln), "more than the capacity survived")
		})
	}
}
