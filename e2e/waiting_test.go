package e2e

import (
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// For a Listener without a socket, or a closed one, Waiting returns an error and not an
// empty list.
func TestWaitingWithoutASocket(t *testing.T) {
	for name, l := range map[string]*acceptq.Listener{"nil": nil, "zero": new(acceptq.Listener)} {
		all, err := l.Waiting(t.Context())
		require.Nil(t, all, name)
		testkit.RequireOp(t, err, "waiting")
		require.ErrorIs(t, err, syscall.EINVAL, name)
	}
	all, err := new(acceptq.Shards).Waiting(t.Context())
	require.Nil(t, all)
	testkit.RequireOp(t, err, "waiting")
	require.ErrorIs(t, err, syscall.EINVAL)

	ln := listenForStats(t)
	_, err = ln.Waiting(nil) //lint:ignore SA1012 that is what is tested
	testkit.RequireOp(t, err, "waiting")
	require.NoError(t, ln.Close())
	all, err = ln.Waiting(t.Context())
	require.Nil(t, all)
	testkit.RequireOp(t, err, "waiting")
	if runtime.GOOS == "linux" {
		require.ErrorIs(t, err, net.ErrClosed)
	}
}

func TestWaitingString(t *testing.T) {
	client := netip.MustParseAddrPort("192.0.2.1:99")
	for want, w := range map[string]acceptq.Waiting{
		"192.0.2.1:99 for 1.5s, 7 bytes received":                                         {Client: client, Waited: 1500 * time.Millisecond, Received: 7},
		"192.0.2.1:99 for 0s, 0 bytes received, closed by the client":                     {Client: client, Closed: true},
		"192.0.2.1:99 for an unknown time, unknown bytes received":                        {Client: client, Waited: -1, Received: -1},
		"192.0.2.1:99 for 0s, 0 bytes received, perhaps in the queue of another listener": {Client: client, Shared: true},
	} {
		require.Equal(t, want, w.String())
	}
}
