//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// The tests of these systems run by themselves, on a bare kernel: they need
// 127.0.0.1, and no file and no other program.

func TestMeasuredOnFreeBSDOnly(t *testing.T) {
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(100))
	require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
}
