package acceptq

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReadSystemOfNetBSD(t *testing.T) {
	s, err := ReadSystem()
	require.NoError(t, err)
	require.Equal(t, System{
		Ceiling: 128, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
		ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
	}, s)
}
