//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// If the kernel has no SO_ACCEPTCONN, a socket that cannot be listening is still an error.
func TestSocketsThatDoNotListen(t *testing.T) {
	look := func(k *kernel, c syscall.Conn) (err error) {
		raw, rawErr := c.SyscallConn()
		require.NoError(t, rawErr)
		require.NoError(t, raw.Control(func(fd uintptr) { err = k.mustSeemListening(int(fd)) }))
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client := connect(t, "tcp", ln.Addr().String())
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	require.NoError(t, err)
	defer local.Close()

	require.NoError(t, look(&realKernel, ln.(syscall.Conn)))
	for name, c := range map[string]any{
		"the client's end": client, "the server's end": server, "a UDP socket": udp, "a unix listener": local,
	} {
		require.ErrorIs(t, look(&realKernel, c.(syscall.Conn)), errNotListening, name)
	}

	for call, meddle := range map[string]func(k *kernel){
		"getsockopt":  func(k *kernel) { k.getsockoptInt = func(int, int, int) (int, error) { return 0, unix.ENOBUFS } },
		"getsockname": func(k *kernel) { k.getsockname = func(int) (unix.Sockaddr, error) { return nil, unix.ENOBUFS } },
		"getpeername": func(k *kernel) { k.getpeername = func(int) (unix.Sockaddr, error) { return nil, unix.ENOBUFS } },
	} {
		k := realKernel
		meddle(&k)
		err := look(&k, ln.(syscall.Conn))
		require.ErrorIs(t, err, unix.ENOBUFS)
		require.ErrorContains(t, err, call)
	}
}
