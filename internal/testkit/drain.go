package testkit

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

func RequireDrainOp(t *testing.T, err error) {
	t.Helper()
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "drain", op.Op)
}
