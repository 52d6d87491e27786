//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What net makes of an address without a host is asked once, and must be the same
// the second time: the family, both families or one, the error of a port in use.
func TestAddressWithoutHostIsNets(t *testing.T) {
	type socket struct {
		addr   string
		v6only int
	}
	look := func(t *testing.T, ln interface {
		net.Listener
		syscall.Conn
	}) socket {
		addr := *ln.Addr().(*net.TCPAddr)
		addr.Port = 0
		s := socket{addr: addr.String()}
		raw, err := ln.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) {
			if s.v6only, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); err != nil {
				s.v6only = unknown // a socket of IPv4
			}
		}))
		return s
	}
	for _, network := range []string{"tcp", "tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false) // MPTCP has no IPV6_V6ONLY to read on every kernel
			theirs, err := lc.Listen(t.Context(), network, ":0")
			if err != nil {
				t.Skipf("net cannot do it here: %v", err)
			}
			defer theirs.Close()
			want := look(t, theirs.(*net.TCPListener))
			taken := theirs.Addr().(*net.TCPAddr)
			_, wantErr := lc.Listen(t.Context(), network, (&net.TCPAddr{Port: taken.Port}).String())
			require.Error(t, wantErr)
			for range 3 {
				ours, err := Listen(context.Background(), network, ":0")
				require.NoError(t, err)
				require.Equal(t, want, look(t, ours))
				require.NoError(t, ours.Close())

				_, err = Listen(context.Background(), network, (&net.TCPAddr{Port: taken.Port}).String())
				require.EqualError(t, err, wantErr.Error())
			}
		})
	}
	for _, address := range []string{":", "", ":http", ":+80", ":65536", ":-1", "::0", "localhost:0"} {
		_, ok := portAlone(address)
		require.False(t, ok, "%q is net's to judge", address)
	}
}

// The kernel ignores the zone of an address that is not link-local, and net does not
// look whether it exists. A number is a zone too.
func TestAZoneMustExist(t *testing.T) {
	interfaces, err := net.Interfaces()
	require.NoError(t, err)
	loopback := slices.IndexFunc(interfaces, func(i net.Interface) bool { return i.Flags&net.FlagLoopback != 0 })
	require.GreaterOrEqual(t, loopback, 0)
	lo := interfaces[loopback]
	if aFreeAddress("tcp", "::1") == "" {
		t.Skip("no IPv6 here")
	}
	for _, host := range []string{"::1", "::", "2001:db8::1", "::ffff:127.0.0.1"} {
		for _, zone := range []string{"nosuch", "77777", "2147483648", "4294967297", "99999999999999999999", "0", "-1", "+" + strconv.Itoa(lo.Index)} {
			address := net.JoinHostPort(host+"%"+zone, "0")
			err := refused(t, func() (*Listener, error) { return ListenTCP(address) })
			var addrErr *net.AddrError
			require.ErrorAs(t, err, &addrErr, address)
			require.Contains(t, addrErr.Addr, "%"+zone)
		}
	}
	for _, zone := range []string{lo.Name, strconv.Itoa(lo.Index)} {
		for _, host := range []string{"::1", "::"} {
			ourMaker.open(t, "tcp", net.JoinHostPort(host+"%"+zone, "0"))
		}
		sa, err := endpoint{network: "tcp6", at: netip.MustParseAddrPort("[fe80::1%" + zone + "]:80")}.sockaddr()
		require.NoError(t, err)
		require.EqualValues(t, lo.Index, sa.(*unix.SockaddrInet6).ZoneId)
	}
}
