//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package e2e

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// bsdListen listens until the test ends.
func bsdListen(t *testing.T, addr string, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP(addr, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// bsdDial connects a client to ln until the test ends.
func bsdDial(t *testing.T, ln *acceptq.Listener) (net.Conn, error) {
	t.Helper()
	client, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.TooLong)
	if err == nil {
		t.Cleanup(func() { client.Close() })
	}
	return client, err
}

// bsdAccept accepts n connections of ln and closes them.
func bsdAccept(t *testing.T, ln *acceptq.Listener, n int) {
	t.Helper()
	for i := range n {
		require.NoError(t, ln.SetDeadline(time.Now().Add(testkit.TooLong)))
		conn, err := ln.Accept()
		require.NoError(t, err, "connection %d of %d", i+1, n)
		require.NoError(t, conn.Close())
	}
}

// listenAgain calls listen(2) with a backlog of n on the live socket of ln.
func listenAgain(t *testing.T, ln *acceptq.Listener, n int) acceptq.Backlog {
	t.Helper()
	account, err := ln.SetBacklog(n)
	require.NoError(t, err)
	return account
}

// requireDrained requires that a drain has waited for every client. These systems cannot
// keep new clients out, so the error must be ErrStillOpen and nothing else.
func requireDrained(t *testing.T, err error) {
	t.Helper()
	require.ErrorIs(t, err, acceptq.ErrStillOpen)
	testkit.RequireDrainOp(t, err)
}
