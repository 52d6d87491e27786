//go:build !linux

package observe

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestProcessesElsewhere(t *testing.T) {
	holders, complete, err := Processes(t.Context(), 1)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.Nil(t, holders)
	require.False(t, complete)
	holders, complete, err = Processes(t.Context())
	require.NoError(t, err)
	require.True(t, complete)
	require.Empty(t, holders)
}
