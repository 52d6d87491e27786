package graceful

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
)

// DragonFly does not report the length of a long queue. Then the sum over all queues is
// unknown too, and not one less than the known part.
func TestUnknownNumberOfQueued(t *testing.T) {
	err := &Error{Queued: plus(plus(0, 3), -1), Active: 2, err: context.DeadlineExceeded}
	require.Equal(t, -1, err.Queued)
	require.EqualError(t, err, "graceful: cut off: unknown queued, 0 before the first answer, 2 active: context deadline exceeded")
	err.Queued = plus(plus(0, 3), 4)
	require.EqualError(t, err, "graceful: cut off: 7 queued, 0 before the first answer, 2 active: context deadline exceeded")
}
