//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"math"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
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
				s.v6only = unknown // an IPv4 socket
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
		require.False(t, ok, "%q is left to net", address)
	}
}

// The kernel ignores the zone of an address that is not link-local, and net does not check
// that the zone exists. acceptq returns an error. A zone can also be a number.
func TestZoneMustExist(t *testing.T) {
	interfaces, err := net.Interfaces()
	require.NoError(t, err)
	if aFreeAddress("tcp", "::1") == "" {
		t.Skip("no IPv6 here")
	}
	if len(interfaces) == 0 {
		require.Equal(t, "dragonfly", runtime.GOOS)
		ourMaker.open(t, "tcp", "[::1%nosuch]:0") // nothing can be looked up, see TestZoneWithoutInterfaces
		return
	}
	loopback := slices.IndexFunc(interfaces, func(i net.Interface) bool { return i.Flags&net.FlagLoopback != 0 })
	require.GreaterOrEqual(t, loopback, 0)
	lo := interfaces[loopback]
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
			// The kernel of FreeBSD 13.2 refuses ::1 with a zone. The error is that of net.
			address := net.JoinHostPort(host+"%"+zone, "0")
			theirs, want := net.Listen("tcp", address)
			if want != nil {
				require.ErrorIs(t, want, unix.EADDRNOTAVAIL)
				err := refused(t, func() (*Listener, error) { return ListenTCP(address) })
				require.EqualError(t, err, want.Error())
				continue
			}
			require.NoError(t, theirs.Close())
			ourMaker.open(t, "tcp", address)
		}
		sa, err := endpoint{network: "tcp6", at: netip.MustParseAddrPort("[fe80::1%" + zone + "]:80")}.sockaddr()
		require.NoError(t, err)
		require.EqualValues(t, lo.Index, sa.(*unix.SockaddrInet6).ZoneId)
	}
}

// On DragonFly package net finds no interface. Then a zone cannot be looked up, and the
// address is that without the zone. If the list cannot be read, or lacks the zone, that is
// an error.
func TestZoneWithoutInterfaces(t *testing.T) {
	ep := endpoint{network: "tcp6", at: netip.MustParseAddrPort("[::1%nosuch]:80")}
	sa, err := ep.sockaddrAmong(func() ([]net.Interface, error) { return nil, nil })
	require.NoError(t, err)
	require.Equal(t, &unix.SockaddrInet6{Port: 80, Addr: netip.MustParseAddr("::1").As16()}, sa)
	for _, interfaces := range []func() ([]net.Interface, error){
		func() ([]net.Interface, error) { return make([]net.Interface, 1), nil },
		func() ([]net.Interface, error) { return nil, unix.EMFILE },
	} {
		_, err := ep.sockaddrAmong(interfaces)
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
		sa, err := endpoint{network: "tcp6", at: netip.MustParseAddrPort("[fe80::1%" + zone + "]:80")}.sockaddr()
		require.NoError(t, err)
		require.Equal(t, index, sa.(*unix.SockaddrInet6).ZoneId, zone)
	}
}

// The library asks net only where the result depends on the system, and only once for all
// addresses without a host, because net opens a socket each time.
func TestNetIsAskedOnce(t *testing.T) {
	if aFreeAddress("tcp", "::1") == "" {
		t.Skip("no IPv6 here")
	}
	k := realKernel
	k.memory = new(sync.Map)
	asked := 0
	k.getsockoptInt = func(fd, level, name int) (int, error) {
		asked++
		return realKernel.getsockoptInt(fd, level, name)
	}
	literalsAreNets := runtime.GOOS == "openbsd" || runtime.GOOS == "dragonfly"
	for _, tt := range []struct {
		network, address string
		asked            bool
	}{
		{"tcp", "[::1]:80", literalsAreNets},
		{"tcp6", "[::1]:80", literalsAreNets},
		{"tcp6", ":80", true},
		{"tcp6", ":80", false},
		{"tcp6", ":81", false},
		{"tcp6", "[::]:80", true},
		{"tcp6", "[::]:80", true},
	} {
		asked = 0
		ep, err := k.resolve(t.Context(), tt.network, tt.address)
		require.NoError(t, err)
		require.Equal(t, tt.asked, asked == 1, "%s %s", tt.network, tt.address)
		require.Equal(t, "tcp6", ep.network)
		require.Equal(t, tt.network == "tcp6" || runtime.GOOS == "dragonfly", ep.v6only, "IPV6_V6ONLY is always on on DragonFly")
	}
	for _, tt := range []struct {
		network, address string
		ok               bool
	}{
		{"tcp", "192.0.2.1:80", true}, {"tcp4", "192.0.2.1:80", true}, {"tcp6", "192.0.2.1:80", false}, {"udp", "192.0.2.1:80", false},
		{"tcp", "[2001:db8::1]:80", !literalsAreNets}, {"tcp4", "[2001:db8::1]:80", false},
		{"tcp", "0.0.0.0:80", false}, {"tcp", "[::ffff:192.0.2.1]:80", false}, {"tcp", "[::1%1]:80", false},
		{"tcp", "192.0.2.1:http", false}, {"tcp", "192.0.2.1", false},
	} {
		_, ok := literal(tt.network, tt.address)
		require.Equal(t, tt.ok, ok, "%s %s", tt.network, tt.address)
	}
}

func TestRawIntOfAClosedSocket(t *testing.T) {
	ln := listen(t)
	require.NoError(t, ln.Close())
	_, err := rawInt(ln.intake.raw, func(int) (int, error) { panic("there is no descriptor") })
	require.ErrorIs(t, err, net.ErrClosed)
}

// A literal that this package parses is a literal for net too, with the same meaning.
func FuzzLiteralIsNets(f *testing.F) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:80", "[fe80::1%lo]:1", "1.2.3.4:065", "[::ffff:1.2.3.4]:5", "[::]:+1", "0.0.0.0:65535"} {
		for _, network := range []string{"tcp", "tcp4", "tcp6", "udp"} {
			f.Add(network, address)
		}
	}
	f.Fuzz(func(t *testing.T, network, address string) {
		ep, ok := literal(network, address)
		if !ok {
			return
		}
		want, err := net.ResolveTCPAddr(network, address)
		require.NoError(t, err)
		require.Equal(t, want.String(), ep.addr().String())
	})
}
