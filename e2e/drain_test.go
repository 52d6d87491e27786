package e2e

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// requireDrained requires that a drain has waited for every client. On a system that
// cannot keep new clients out, the error must be ErrStillOpen and nothing else.
func requireDrained(t *testing.T, err error) {
	t.Helper()
	if runtime.GOOS == "linux" {
		require.NoError(t, err)
		return
	}
	require.ErrorIs(t, err, acceptq.ErrStillOpen)
	testkit.RequireDrainOp(t, err)
}
