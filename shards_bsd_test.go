//go:build dragonfly || freebsd

package acceptq

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// groupOption is the socket option with which the kernel can spread connections, set
// without the library.
func groupOption() int {
	if runtime.GOOS == "freebsd" {
		return 0x10000 // SO_REUSEPORT_LB
	}
	return unix.SO_REUSEPORT
}

// groupShares opens two listeners on one address with groupOption, and counts the
// clients that each gets.
func groupShares(network, host string) (shares [2]int, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, groupOption(), 1)
		})
		return errors.Join(cerr, err)
	}}
	const clients = 30 // that one of two that share gets all has a chance of 1 in 2^29
	address := net.JoinHostPort(host, "0")
	accepted := make(chan int, clients)
	var loops sync.WaitGroup
	defer loops.Wait()
	for i := range shares {
		ln, err := lc.Listen(context.Background(), network, address)
		if err != nil {
			return shares, err
		}
		defer ln.Close()
		address = ln.Addr().String()
		loops.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
				accepted <- i
			}
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), tooLong)
	defer cancel()
	addr, err := net.ResolveTCPAddr(network, address)
	if err != nil {
		return shares, err
	}
	for range clients {
		c, err := dialSpread(ctx, addr)
		if err != nil {
			return shares, err
		}
		defer c.Close()
	}
	late := time.After(tooLong)
	for range clients {
		select {
		case i := <-accepted:
			shares[i]++
		case <-late:
			return shares, errors.New("not all clients were accepted")
		}
	}
	return shares, nil
}

var kernelSpreads = sync.OnceValue(func() bool {
	shares, err := groupShares("tcp4", "127.0.0.1")
	return err == nil && shares[0] > 0 && shares[1] > 0
})

// The library returns an error for shards exactly where the kernel gives all
// connections to one listener. The library decides by the release and the jail; the
// test measures.
func TestShardsWithoutSpreadingAreAnError(t *testing.T) {
	for _, row := range []struct{ network, host string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
		t.Run(row.host, func(t *testing.T) {
			shares, err := groupShares(row.network, row.host)
			if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT) {
				t.Skipf("there is no %s here (%v): give lo0, or the jail, that address", row.host, err)
			}
			require.NoError(t, err)
			t.Logf("the kernel gave %v", shares)
			spread := shares[0] > 0 && shares[1] > 0

			if spread && releaseInDoubt() {
				t.Skip("jail(8) can set another number, and the library then assumes an older kernel")
			}
			s, err := ListenShards(t.Context(), row.network, net.JoinHostPort(row.host, "0"), 2)
			if spread {
				require.NoError(t, err)
				require.NoError(t, s.Close())
			} else {
				require.ErrorIs(t, err, errors.ErrUnsupported)
				require.ErrorContains(t, err, "more than one shard")
				require.NotContains(t, err.Error(), "WithReusePort", "the caller did not pass it")
			}
			ln, err := Listen(t.Context(), row.network, net.JoinHostPort(row.host, "0"), WithReusePort())
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
	needSpread(t)
	most := 256
	if runtime.GOOS == "dragonfly" {
		most = 128
	}
	s, err := ListenTCPShards("127.0.0.1:0", most)
	require.NoError(t, err)
	addr := s.Addr().String()
	require.NoError(t, s.Close())
	s, err = ListenTCPShards(addr, most+1)
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	again, err := ListenTCP(addr)
	require.NoError(t, err)
	require.NoError(t, again.Close())
}

// Two groups of one process on one address, as when a server opens its new listeners
// before it closes the old ones: what does not fit is an error, not a listener without
// clients.
func TestTwoGroupsOnOneAddress(t *testing.T) {
	needSpread(t)
	most := maxGroup(runtime.GOOS)
	a, err := ListenTCPShards("127.0.0.1:0", most-10, WithReusePort())
	require.NoError(t, err)
	defer a.Close()
	b, err := ListenTCPShards(a.Addr().String(), 11, WithReusePort())
	require.Nil(t, b)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	b, err = ListenTCPShards(a.Addr().String(), 10, WithReusePort())
	require.NoError(t, err, "a failed call must leave the places free")
	defer b.Close()
	require.NoError(t, a.Close())
	c, err := ListenTCPShards(b.Addr().String(), most-10, WithReusePort())
	require.NoError(t, err, "a closed group must leave its places free")
	require.NoError(t, c.Close())
}
