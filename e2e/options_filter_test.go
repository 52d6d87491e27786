//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package e2e

import (
	"errors"
	"net"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// needFilters skips a test on a kernel that has no filters, or ignores them.
func needFilters(t *testing.T) {
	t.Helper()
	if err := sockopt.MustFilter(&sys.Real); err != nil {
		t.Skip("see TestFiltersWithoutEffectAreAnError:", err)
	}
}

// listenFiltered listens with the filter dataready. If its module is not loaded, it
// skips the test and names the command that loads it.
func listenFiltered(t *testing.T, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	needFilters(t)
	before := testkit.OpenDescriptors()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	if errors.Is(err, unix.ENOENT) {
		requireListenError(t, ln, err)
		load := map[string]string{
			"freebsd":   "kldload accf_data",
			"dragonfly": "kldload accf_data",
			"netbsd":    "modload accf_dataready",
		}[runtime.GOOS]
		require.ErrorContains(t, err, load)
		require.Equal(t, before, testkit.OpenDescriptors())
		t.Skip("this kernel has no filter dataready: " + load)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestAcceptFilterUnknown(t *testing.T) {
	needFilters(t)
	before := testkit.OpenDescriptors()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithAcceptFilter("nosuchfilter", ""))
	require.ErrorIs(t, err, unix.ENOENT)
	require.ErrorContains(t, err, `"nosuchfilter": no such filter is loaded`)
	requireListenError(t, ln, err)
	require.Equal(t, before, testkit.OpenDescriptors())
}

func incomplete(t *testing.T, ln *acceptq.Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Incomplete
}

// A drain waits for connections that a filter holds back, also where the system does not
// report their number: clients that connected before the drain are served.
func TestDrainServesHeldBackConnections(t *testing.T) {
	ln := listenFiltered(t, acceptq.WithAcceptFilter("dataready", ""))
	const clients = 5
	var silent []*net.TCPConn
	for range clients {
		silent = append(silent, testkit.Dial(t, ln.Addr()))
	}
	accepted := make(chan net.Conn, clients)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	for _, c := range silent {
		_, err := c.Write([]byte("x"))
		require.NoError(t, err)
	}
	requireDrained(t, testkit.Received(t, drained))
	require.NoError(t, ln.Close())
	<-done
	require.Len(t, accepted, clients)
	for range clients {
		require.NoError(t, (<-accepted).Close())
	}
}
