package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
)

func TestReadSystemOfNetBSD(t *testing.T) {
	s, err := acceptq.ReadSystem()
	require.NoError(t, err)
	require.Equal(t, acceptq.System{
		Ceiling: 128, SYNBacklog: sys.Unknown, SYNCookies: sys.Unknown, AbortOnOverflow: sys.Unknown, MigrateRequests: sys.Unknown,
		ListenOverflows: sys.Unknown, ListenDrops: sys.Unknown, ReqQFullDrop: sys.Unknown, ReqQFullDoCookies: sys.Unknown,
	}, s)
}
