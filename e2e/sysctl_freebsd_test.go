package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
)

func TestReadSystemOfFreeBSD(t *testing.T) {
	s, err := acceptq.ReadSystem()
	require.NoError(t, err)
	sysctl := func(name string) (n int) { // without the library, for a number of any width
		raw, err := unix.SysctlRaw(name)
		require.NoError(t, err, name)
		require.NotEmpty(t, raw, name)
		for i, b := range raw { // every port of Go to FreeBSD is little-endian
			n |= int(b) << (8 * i)
		}
		return n
	}
	require.Contains(t, []int{0, 1}, s.SYNCookies)
	require.Contains(t, []int{0, 1}, s.AbortOnOverflow)
	require.Positive(t, s.Ceiling)
	require.Equal(t, acceptq.System{
		Ceiling: sysctl("kern.ipc.soacceptqueue"), Knob: "kern.ipc.soacceptqueue",
		SYNBacklog:      sys.Unknown,
		SYNCookies:      sysctl("net.inet.tcp.syncookies"),
		AbortOnOverflow: sysctl("net.inet.tcp.syncache.rst_on_sock_fail"),
		MigrateRequests: sys.Unknown,
		ListenOverflows: sys.Unknown, ListenDrops: sys.Unknown, ReqQFullDrop: sys.Unknown, ReqQFullDoCookies: sys.Unknown,
	}, s)
}
