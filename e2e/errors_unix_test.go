//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package e2e

import (
	"errors"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestErrorsMatchTheKernelsErrno(t *testing.T) {
	holder := ourMaker.Open(t, "tcp", "127.0.0.1:0")
	err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP(holder.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	testkit.RequireLayers(t, err, "tcp", "bind")

	err = testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP("192.0.2.1:0") })
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	testkit.RequireLayers(t, err, "tcp", "bind")
}

// Several listeners can share a port only if each has the option.
func TestReusePort(t *testing.T) {
	if !testkit.Spreads() {
		err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort()) })
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	name, err := sockopt.ReusePort()
	require.NoError(t, err)
	o := testkit.SocketOption{Level: unix.SOL_SOCKET, Name: name}
	plain := ourMaker.Open(t, "tcp", "127.0.0.1:0")
	require.Zero(t, testkit.Option(t, plain, o))

	first := testkit.Maker{Listen: listenOurs(acceptq.WithReusePort())}.Open(t, "tcp", "127.0.0.1:0")
	second := testkit.Maker{Listen: listenOurs(acceptq.WithReusePort())}.Open(t, "tcp", first.Addr().String())
	require.NotZero(t, testkit.Option(t, first, o))
	require.Equal(t, first.Addr(), second.Addr())
	err = testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP(first.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE, "every socket of the address needs it")
}
