//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package e2e

import (
	"runtime"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

var (
	reuseAddr = testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_REUSEADDR}
	keepAlive = testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_KEEPALIVE}
	noDelay   = testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_NODELAY}
	v6only    = testkit.SocketOption{Level: unix.IPPROTO_IPV6, Name: unix.IPV6_V6ONLY}
)

// requireAdopted requires that a descriptor has the flags that Go sets on its own.
func requireAdopted(t *testing.T, c syscall.Conn) {
	t.Helper()
	flags := testkit.OnDescriptor(t, c, func(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0) })
	require.NotZero(t, flags&unix.FD_CLOEXEC, "close-on-exec")
	flags = testkit.OnDescriptor(t, c, func(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0) })
	require.NotZero(t, flags&unix.O_NONBLOCK, "non-blocking")
}

// The socket is close-on-exec from its creation, before net makes its copy.
func TestSocketIsCloseOnExecFromTheStart(t *testing.T) {
	fd, err := sys.Real.Socket(unix.AF_INET)
	require.NoError(t, err)
	defer unix.Close(fd)
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	require.NoError(t, err)
	require.NotZero(t, flags&unix.FD_CLOEXEC)
}

func TestListeningSocketMatchesNet(t *testing.T) {
	for _, tc := range []struct{ network, address string }{
		{"tcp", ":0"},
		{"tcp4", ":0"},
		{"tcp6", ":0"},
		{"tcp", "127.0.0.1:0"},
		{"tcp", "[::1]:0"},
		{"tcp6", "[::1]:0"},
	} {
		t.Run(tc.network+" "+tc.address, func(t *testing.T) {
			if ln, err := tcpMaker.Listen(tc.network, tc.address); err != nil {
				t.Skipf("net cannot here: %v", err)
			} else {
				ln.Close()
			}
			want, got := tcpMaker.Open(t, tc.network, tc.address), ourMaker.Open(t, tc.network, tc.address)
			requireAdopted(t, want)
			requireAdopted(t, got)

			require.NotZero(t, testkit.Option(t, got, reuseAddr), "SO_REUSEADDR")
			require.Zero(t, testkit.Option(t, got, keepAlive), "keep-alive on a listener breaks it on NetBSD and macOS")
			same := map[string]testkit.SocketOption{
				"SO_REUSEADDR": reuseAddr,
				"SO_REUSEPORT": {Level: unix.SOL_SOCKET, Name: unix.SO_REUSEPORT},
				"SO_TYPE":      {Level: unix.SOL_SOCKET, Name: unix.SO_TYPE},
				"SO_RCVBUF":    {Level: unix.SOL_SOCKET, Name: unix.SO_RCVBUF},
				"SO_SNDBUF":    {Level: unix.SOL_SOCKET, Name: unix.SO_SNDBUF},
				"SO_KEEPALIVE": keepAlive,
				"TCP_NODELAY":  noDelay,
			}
			if family(t, want) == unix.AF_INET6 {
				same["IPV6_V6ONLY"] = v6only
			}
			require.Equal(t, family(t, want), family(t, got))
			for name, o := range same {
				require.Equal(t, testkit.Option(t, want, o), testkit.Option(t, got, o), name)
			}
		})
	}
}

// A WithControl function gets a socket with the same options as the one of net. The test
// compares them before listen(2), which may change them.
func TestControlSeesTheSameSocketAsNet(t *testing.T) {
	for _, tc := range []struct{ network, address string }{
		{"tcp", ":0"},
		{"tcp6", ":0"},
		{"tcp", "[::1]:0"},
		{"tcp6", "[::1]:0"},
	} {
		t.Run(tc.network+" "+tc.address, func(t *testing.T) {
			var seen []int
			look := func(network, _ string, c syscall.RawConn) error {
				for _, o := range []testkit.SocketOption{reuseAddr, v6only} {
					if o == v6only && network != "tcp6" {
						continue
					}
					v, err := endpoint.RawInt(c, func(fd int) (int, error) { return unix.GetsockoptInt(fd, o.Level, o.Name) })
					if err != nil {
						return err
					}
					seen = append(seen, v)
				}
				return nil
			}
			ln, err := testkit.ListenTCPOnly(look)(tc.network, tc.address)
			if err != nil {
				t.Skipf("net cannot here: %v", err)
			}
			require.NoError(t, ln.Close())
			want := seen
			seen = nil
			ln, err = listenOurs(acceptq.WithControl(look))(tc.network, tc.address)
			require.NoError(t, err)
			require.NoError(t, ln.Close())
			require.Equal(t, want, seen)
		})
	}
}

func family(t *testing.T, ln syscall.Conn) int {
	return testkit.OnDescriptor(t, ln, func(fd int) (int, error) {
		sa, err := unix.Getsockname(fd)
		if _, ok := sa.(*unix.SockaddrInet6); ok {
			return unix.AF_INET6, err
		}
		return unix.AF_INET, err
	})
}

// keepAliveOptions are the options with the three numbers of keep-alive. x/sys lacks
// some of them for some systems. OpenBSD has none.
func keepAliveOptions() (idle, interval, count testkit.SocketOption, ok bool) {
	o := func(name int) testkit.SocketOption { return testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: name} }
	switch runtime.GOOS {
	case "linux", "android":
		return o(4), o(5), o(6), true
	case "netbsd":
		return o(3), o(5), o(6), true
	case "freebsd", "dragonfly":
		return o(0x100), o(0x200), o(0x400), true
	case "darwin", "ios":
		return o(0x10), o(0x101), o(0x102), true
	}
	return
}

func TestAcceptedConnectionMatchesNet(t *testing.T) {
	for _, m := range allMakers {
		t.Run(m.Name, func(t *testing.T) {
			ln := m.Open(t, "tcp", "127.0.0.1:0")
			testkit.Connect(t, "tcp", ln.Addr().String())
			c := accept(t, ln)
			requireAdopted(t, c)
			require.NotZero(t, testkit.Option(t, c, noDelay), "TCP_NODELAY")
			require.NotZero(t, testkit.Option(t, c, keepAlive), "SO_KEEPALIVE")
			if idle, interval, count, ok := keepAliveOptions(); ok {
				require.Equal(t, 15, testkit.Option(t, c, idle), "idle, in seconds")
				require.Equal(t, 15, testkit.Option(t, c, interval), "interval, in seconds")
				require.Equal(t, 9, testkit.Option(t, c, count), "probes")
			}
		})
	}
}
