//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package e2e

import (
	"testing"
	"time"

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

// queuedBecomes waits until the listener reports n queued connections. The handshake of
// a client can end before that of the server.
func queuedBecomes(t testing.TB, n int, stats func() (acceptq.Stats, error)) acceptq.Stats {
	t.Helper()
	var last acceptq.Stats
	var err error
	require.Eventually(t, func() bool {
		last, err = stats()
		return err != nil || last.Queued == n
	}, 20*time.Second, time.Millisecond, "Queued never became %d", n)
	require.NoError(t, err)
	return last
}
