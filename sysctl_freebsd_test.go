package acceptq

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestReadSystemOfFreeBSD(t *testing.T) {
	s, err := ReadSystem()
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
	require.Equal(t, System{
		Ceiling: sysctl("kern.ipc.soacceptqueue"), Knob: "kern.ipc.soacceptqueue",
		SYNBacklog:      unknown,
		SYNCookies:      sysctl("net.inet.tcp.syncookies"),
		AbortOnOverflow: sysctl("net.inet.tcp.syncache.rst_on_sock_fail"),
		MigrateRequests: unknown,
		ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
	}, s)
}
