//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// requireDrained requires that a drain has waited for every client. These systems cannot
// keep new clients out, so the error must be ErrStillOpen and nothing else.
func requireDrained(t *testing.T, err error) {
	t.Helper()
	require.ErrorIs(t, err, acceptq.ErrStillOpen)
	testkit.RequireDrainOp(t, err)
}
