//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Listeners of one process above the maximum of a group are an error, because the kernel
// would let them listen and assign no connections to them. The maximum is 3 here.
func TestGroupHasAMaximum(t *testing.T) {
	if !spreads() {
		t.Skip("no groups here")
	}
	k := realKernel
	k.memory = new(sync.Map)
	k.memory.Store(censusMemory{}, &census{most: 3})
	open := func(t *testing.T, address string, opts ...Option) *Listener {
		t.Helper()
		ln, err := k.listenWith(t.Context(), "tcp4", address, append(opts, WithReusePort()))
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	refuse := func(t *testing.T, address string) {
		t.Helper()
		before := openDescriptors()
		ln, err := k.listenWith(t.Context(), "tcp4", address, []Option{WithReusePort()})
		require.Nil(t, ln)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		requireOp(t, err, "listen")
		require.Equal(t, before, openDescriptors())
	}
	for _, host := range []string{"127.0.0.1", ""} {
		t.Run("on "+host, func(t *testing.T) {
			first := open(t, net.JoinHostPort(host, "0"))
			_, port, err := net.SplitHostPort(first.Addr().String())
			require.NoError(t, err)
			address := net.JoinHostPort(host, port)
			_, err = k.listenWith(t.Context(), "tcp4", address, []Option{WithReusePort(),
				WithControl(func(string, string, syscall.RawConn) error { return errors.ErrUnsupported })})
			require.Error(t, err, "it must not keep its place")
			second := open(t, address)
			open(t, address)
			refuse(t, address)
			open(t, net.JoinHostPort(host, "0")) // another address has a group of its own
			require.NoError(t, second.Close())
			open(t, address)
			refuse(t, address)
			require.NoError(t, first.TCPListener().Close(), "closed without a method of the Listener")
			open(t, address)
			refuse(t, address)
		})
	}
	s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 4, []Option{WithReusePort()})
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
