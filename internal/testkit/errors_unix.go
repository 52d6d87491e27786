//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package testkit

import (
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// RequireLayers requires that err is an OpError with the network and an address, which
// wraps a SyscallError of the call, which wraps an errno.
func RequireLayers(t *testing.T, err error, network, call string) {
	t.Helper()
	op, ok := err.(*net.OpError)
	require.True(t, ok, "%T", err)
	require.Equal(t, network, op.Net)
	require.NotNil(t, op.Addr)
	sysErr, ok := op.Err.(*os.SyscallError)
	require.True(t, ok, "%T", op.Err)
	require.Equal(t, call, sysErr.Syscall)
	require.IsType(t, unix.Errno(0), sysErr.Err)
}
