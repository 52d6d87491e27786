//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package e2e

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
)

// The tests of these systems run on a bare kernel. They need only 127.0.0.1, and no
// file or other program.

func TestMeasuredOnFreeBSDOnly(t *testing.T) {
	ln := bsdListen(t, "127.0.0.1:0", acceptq.WithBacklog(100))
	require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
}
