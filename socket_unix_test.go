//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// DragonFly has no SO_ACCEPTCONN. SO_ACCEPTFILTER tells there which sockets listen. On other
// systems this test answers like DragonFly's kernel.
func TestSocketsThatDoNotListen(t *testing.T) {
	k := realKernel
	if runtime.GOOS != "dragonfly" {
		k.getsockoptInt = func(fd, level, name int) (int, error) {
			require.Equal(t, soAcceptFilter, name)
			if n, err := realKernel.getsockoptInt(fd, level, unix.SO_ACCEPTCONN); err != nil || n != 0 {
				return 0, err
			}
			return 0, unix.EINVAL
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client := connect(t, "tcp", ln.Addr().String())
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	reset := connect(t, "tcp", ln.Addr().String())
	resetter, err := ln.Accept()
	require.NoError(t, err)
	require.NoError(t, resetter.(*net.TCPConn).SetLinger(0))
	require.NoError(t, resetter.Close())
	reset.SetReadDeadline(time.Now().Add(patience))
	_, err = reset.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	require.NoError(t, err)
	defer local.Close()
	bound, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(bound)
	require.NoError(t, unix.Bind(bound, &unix.SockaddrInet4{Addr: [...]byte{127, 0, 0, 1}}))

	look := func(c any) (yes bool) {
		raw, err := c.(syscall.Conn).SyscallConn()
		require.NoError(t, err)
		var operr error
		require.NoError(t, raw.Control(func(fd uintptr) { yes, operr = k.hasFilterOption(int(fd)) }))
		require.NoError(t, operr)
		return yes
	}
	require.True(t, look(ln))
	for name, c := range map[string]any{
		"the client's end": client, "the server's end": server, "a reset connection": reset, "a UDP socket": udp,
	} {
		require.False(t, look(c), name)
		_, err := ReadStats(c.(syscall.Conn))
		require.ErrorIs(t, err, errNotListening, name)
	}
	yes, err := k.hasFilterOption(bound)
	require.NoError(t, err)
	require.False(t, yes, "a socket that is only bound")
	require.ErrorIs(t, realKernel.mustListen(bound), errNotListening)
	_, err = ReadStats(local.(syscall.Conn))
	require.ErrorIs(t, err, errNotListening, "a unix listener")

	k.getsockoptInt = func(int, int, int) (int, error) { return 0, unix.ENOBUFS }
	_, err = k.hasFilterOption(bound)
	require.ErrorIs(t, err, unix.ENOBUFS)
	require.ErrorContains(t, err, "getsockopt")
}
