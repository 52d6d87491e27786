//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package e2e

import (
	"context"
	"math"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The library asks net once how it treats an address without a host. The result must match
// net also the second time: the family, one family or both, the error for a port in use.
func TestAddressWithoutHostMatchesNet(t *testing.T) {
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
				s.v6only = sys.Unknown // an IPv4 socket
			}
		}))
		return s
	}
	for _, network := range []string{"tcp", "tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false) // on some kernels IPV6_V6ONLY cannot be read from an MPTCP socket
			theirs, err := lc.Listen(t.Context(), network, ":0")
			if err != nil {
				t.Skipf("net cannot listen there: %v", err)
			}
			defer theirs.Close()
			want := look(t, theirs.(*net.TCPListener))
			taken := theirs.Addr().(*net.TCPAddr)
			_, wantErr := lc.Listen(t.Context(), network, (&net.TCPAddr{Port: taken.Port}).String())
			require.Error(t, wantErr)
			for range 3 {
				ours, err := acceptq.Listen(context.Background(), network, ":0")
				require.NoError(t, err)
				require.Equal(t, want, look(t, ours))
				require.NoError(t, ours.Close())

				_, err = acceptq.Listen(context.Background(), network, (&net.TCPAddr{Port: taken.Port}).String())
				require.EqualError(t, err, wantErr.Error())
			}
		})
	}
	for _, address := range []string{":", "", ":http", ":+80", ":65536", ":-1", "::0", "localhost:0"} {
		_, ok := endpoint.PortAlone(address)
		require.False(t, ok, "%q is left to net", address)
	}
}

// The kernel ignores the zone of an address that is not link-local, and net does not check
// that the zone exists. acceptq returns an error. A zone can also be a number.
func TestZoneMustExist(t *testing.T) {
	interfaces, err := net.Interfaces()
	require.NoError(t, err)
	if testkit.AFreeAddress("tcp", "::1") == "" {
		t.Skip("no IPv6 here")
	}
	if len(interfaces) == 0 {
		require.Equal(t, "dragonfly", runtime.GOOS)
		ourMaker.Open(t, "tcp", "[::1%nosuch]:0") // nothing can be looked up, see TestZoneWithoutInterfaces
		return
	}
	loopback := slices.IndexFunc(interfaces, func(i net.Interface) bool { return i.Flags&net.FlagLoopback != 0 })
	require.GreaterOrEqual(t, loopback, 0)
	lo := interfaces[loopback]
	for _, host := range []string{"::1", "::", "2001:db8::1", "::ffff:127.0.0.1"} {
		for _, zone := range []string{"nosuch", "77777", "2147483648", "4294967297", "99999999999999999999", "0", "-1", "+" + strconv.Itoa(lo.Index)} {
			address := net.JoinHostPort(host+"%"+zone, "0")
			err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP(address) })
			var addrErr *net.AddrError
			require.ErrorAs(t, err, &addrErr, address)
			require.Contains(t, addrErr.Addr, "%"+zone)
		}
	}
	for _, zone := range []string{lo.Name, strconv.Itoa(lo.Index)} {
		for _, host := range []string{"::1", "::"} {
			// The kernel of FreeBSD 13.2 refuses ::1 with a zone. The error is that of net.
			address := net.JoinHostPort(host+"%"+zone, "0")
			theirs, want := net.Listen("tcp", address)
			if want != nil {
				require.ErrorIs(t, want, unix.EADDRNOTAVAIL)
				err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP(address) })
				require.EqualError(t, err, want.Error())
				continue
			}
			require.NoError(t, theirs.Close())
			ourMaker.Open(t, "tcp", address)
		}
		sa, err := endpoint.Endpoint{Network: "tcp6", At: netip.MustParseAddrPort("[fe80::1%" + zone + "]:80")}.Sockaddr()
		require.NoError(t, err)
		require.EqualValues(t, lo.Index, sa.(*unix.SockaddrInet6).ZoneId)
	}
}

// On DragonFly package net finds no interface. Then a zone cannot be looked up, and the
// address is that without the zone. If the list cannot be read, or lacks the zone, that is
// an error.
func TestZoneWithoutInterfaces(t *testing.T) {
	ep := endpoint.Endpoint{Network: "tcp6", At: netip.MustParseAddrPort("[::1%nosuch]:80")}
	sa, err := ep.SockaddrAmong(func() ([]net.Interface, error) { return nil, nil })
	require.NoError(t, err)
	require.Equal(t, &unix.SockaddrInet6{Port: 80, Addr: netip.MustParseAddr("::1").As16()}, sa)
	for _, interfaces := range []func() ([]net.Interface, error){
		func() ([]net.Interface, error) { return make([]net.Interface, 1), nil },
		func() ([]net.Interface, error) { return nil, unix.EMFILE },
	} {
		_, err := ep.SockaddrAmong(interfaces)
		var addrErr *net.AddrError
		require.ErrorAs(t, err, &addrErr)
	}
}

// For a link-local address bind(2) checks the zone, whatever its number. No zone may be
// turned into the number of another interface.
func TestZoneOfALinkLocalAddress(t *testing.T) {
	for zone, index := range map[string]uint32{
		"9999999": 9999999, "2147483647": math.MaxInt32, "2147483648": math.MaxInt32, "4294967297": math.MaxInt32, "nosuch": 0,
	} {
		sa, err := endpoint.Endpoint{Network: "tcp6", At: netip.MustParseAddrPort("[fe80::1%" + zone + "]:80")}.Sockaddr()
		require.NoError(t, err)
		require.Equal(t, index, sa.(*unix.SockaddrInet6).ZoneId, zone)
	}
}
