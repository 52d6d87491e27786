//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package endpoint

import (
	"net"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The library asks net only where the result depends on the system, and only once for all
// addresses without a host, because net opens a socket each time.
func TestNetIsAskedOnce(t *testing.T) {
	if testkit.AFreeAddress("tcp", "::1") == "" {
		t.Skip("no IPv6 here")
	}
	k := sys.Real
	k.Memory = new(sync.Map)
	asked := 0
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		asked++
		return sys.Real.GetsockoptInt(fd, level, name)
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
		ep, err := Resolve(&k, t.Context(), tt.network, tt.address)
		require.NoError(t, err)
		require.Equal(t, tt.asked, asked == 1, "%s %s", tt.network, tt.address)
		require.Equal(t, "tcp6", ep.Network)
		require.Equal(t, tt.network == "tcp6" || runtime.GOOS == "dragonfly", ep.V6Only, "IPV6_V6ONLY is always on on DragonFly")
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
		require.Equal(t, want.String(), ep.Addr().String())
	})
}
