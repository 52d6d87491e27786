//go:build dragonfly || freebsd

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
	"github.com/acceptq/acceptq/internal/testkit"
)

// The library returns an error for shards exactly where the kernel gives all
// connections to one listener. The library decides by the release and the jail; the
// test measures.
func TestShardsWithoutSpreadingAreAnError(t *testing.T) {
	for _, row := range []struct{ network, host string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
		t.Run(row.host, func(t *testing.T) {
			shares, err := testkit.GroupShares(row.network, row.host)
			if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT) {
				t.Skipf("there is no %s here (%v): give lo0, or the jail, that address", row.host, err)
			}
			require.NoError(t, err)
			t.Logf("the kernel gave %v", shares)
			spread := shares[0] > 0 && shares[1] > 0

			if spread && releaseInDoubt() {
				t.Skip("jail(8) can set another number, and the library then assumes an older kernel")
			}
			s, err := acceptq.ListenShards(t.Context(), row.network, net.JoinHostPort(row.host, "0"), 2)
			if spread {
				require.NoError(t, err)
				require.NoError(t, s.Close())
			} else {
				require.ErrorIs(t, err, errors.ErrUnsupported)
				require.ErrorContains(t, err, "more than one shard")
				require.NotContains(t, err.Error(), "WithReusePort", "the caller did not pass it")
			}
			ln, err := acceptq.Listen(t.Context(), row.network, net.JoinHostPort(row.host, "0"), acceptq.WithReusePort())
			if spread {
				require.NoError(t, err)
				require.NoError(t, ln.Close())
			} else {
				require.ErrorIs(t, err, errors.ErrUnsupported)
				require.ErrorContains(t, err, "WithReusePort")
			}
		})
	}
}

// releaseInDoubt reports whether DragonFly's release says that it does not spread over the
// sockets of this jail. A development kernel can report the number of the release before.
func releaseInDoubt() bool {
	release, err := unix.SysctlUint32("kern.osreldate")
	jailed, jerr := unix.SysctlUint32("jail.jailed")
	return runtime.GOOS == "dragonfly" && err == nil && jerr == nil && jailed == 1 && release < 500900
}

// The kernel assigns no connections to a socket above its maximum, but lets it listen.
// The library returns an error and leaves the address free.
func TestMaximumOfShards(t *testing.T) {
	testkit.NeedSpread(t)
	most := 256
	if runtime.GOOS == "dragonfly" {
		most = 128
	}
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", most)
	require.NoError(t, err)
	addr := s.Addr().String()
	require.NoError(t, s.Close())
	s, err = acceptq.ListenTCPShards(addr, most+1)
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	again, err := acceptq.ListenTCP(addr)
	require.NoError(t, err)
	require.NoError(t, again.Close())
}

// Two groups of one process on one address, as when a server opens its new listeners
// before it closes the old ones: what does not fit is an error, not a listener without
// clients.
func TestTwoGroupsOnOneAddress(t *testing.T) {
	testkit.NeedSpread(t)
	most := sockopt.MaxGroup(runtime.GOOS)
	a, err := acceptq.ListenTCPShards("127.0.0.1:0", most-10, acceptq.WithReusePort())
	require.NoError(t, err)
	defer a.Close()
	b, err := acceptq.ListenTCPShards(a.Addr().String(), 11, acceptq.WithReusePort())
	require.Nil(t, b)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	b, err = acceptq.ListenTCPShards(a.Addr().String(), 10, acceptq.WithReusePort())
	require.NoError(t, err, "a failed call must leave the places free")
	defer b.Close()
	require.NoError(t, a.Close())
	c, err := acceptq.ListenTCPShards(b.Addr().String(), most-10, acceptq.WithReusePort())
	require.NoError(t, err, "a closed group must leave its places free")
	require.NoError(t, c.Close())
}
