//go:build !linux

package e2e

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/testkit"
)

func TestWaitingElsewhere(t *testing.T) {
	ln := listenForStats(t)
	all, err := ln.Waiting(t.Context())
	require.Nil(t, all)
	testkit.RequireOp(t, err, "waiting")
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
