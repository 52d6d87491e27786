package acceptq

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The wildcard of both families is refused, and for the reason given: with the
// option on it all clients go to one socket.
func TestNoShardsOfBothFamilies(t *testing.T) {
	for _, n := range []int{1, 2} {
		s, err := ListenTCPShards(":0", n, WithReusePort())
		require.Nil(t, s)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}
	s, err := ListenTCPShards(":0", 2)
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	for _, network := range []string{"tcp4", "tcp6"} {
		s, err := ListenShards(t.Context(), network, ":0", 2)
		require.NoError(t, err, network)
		require.NoError(t, s.Close())
	}

	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT_LB, 1)
		})
		return errors.Join(cerr, err)
	}}
	const clients = 100
	group := new(Shards)
	addr := ":0"
	for range 2 {
		ln, err := lc.Listen(context.Background(), "tcp", addr)
		require.NoError(t, err)
		defer ln.Close()
		l, err := Wrap(ln)
		require.NoError(t, err)
		group.listeners = append(group.listeners, l)
		addr = ln.Addr().String()
	}
	if ip := group.Addr().(*net.TCPAddr).IP; ip.To4() != nil {
		t.Skip("no dual-stack sockets here")
	}
	v4 := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: group.Addr().(*net.TCPAddr).Port}
	connectAll(t, v4, clients)
	queuedBecomes(t, clients, group.Stats)
	require.Eventually(t, func() bool {
		a, _ := group.listeners[0].Stats()
		b, _ := group.listeners[1].Stats()
		return max(a.Queued, b.Queued) == clients && min(a.Queued, b.Queued) == 0
	}, patience, time.Millisecond, "the kernel spreads them: the library need not refuse")
}

// FreeBSD spreads over 256 sockets, and lets more be bound.
func TestTheMostShards(t *testing.T) {
	s, err := ListenTCPShards("127.0.0.1:0", 256)
	require.NoError(t, err)
	addr := s.Addr().String()
	require.NoError(t, s.Close())
	s, err = ListenTCPShards(addr, 257)
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	again, err := ListenTCP(addr)
	require.NoError(t, err)
	require.NoError(t, again.Close())
}
