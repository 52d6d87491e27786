//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
)

// listen opens a listener that is closed when the test ends.
func listen(t *testing.T, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}
