package acceptq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The wildcard of both families is an error, because there the kernel gives all clients
// to one socket. The test shows both.
func TestNoShardsOfBothFamilies(t *testing.T) {
	needSpread(t)
	for _, n := range []int{1, 2} {
		s, err := ListenTCPShards(":0", n, WithReusePort())
		require.Nil(t, s)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}
	s, err := ListenTCPShards(":0", 2)
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "more than one shard")
	require.NotContains(t, err.Error(), "WithReusePort", "the caller did not pass it")
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
		group.listeners = append(shardsOf(group), l)
		addr = ln.Addr().String()
	}
	if ip := group.Addr().(*net.TCPAddr).IP; ip.To4() != nil {
		t.Skip("no dual-stack sockets here")
	}
	v4 := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: group.Addr().(*net.TCPAddr).Port}
	connectAll(t, v4, clients)
	queuedBecomes(t, clients, group.Stats)
	require.Eventually(t, func() bool {
		a, _ := shardsOf(group)[0].Stats()
		b, _ := shardsOf(group)[1].Stats()
		return max(a.Queued, b.Queued) == clients && min(a.Queued, b.Queued) == 0
	}, patience, time.Millisecond, "the kernel spreads them: the library need not refuse")
}

// Another user cannot join shards on a single address. On a wildcard address another
// user can join them before FreeBSD 15, which fixed this.
func TestJoinShardsAsAnotherUser(t *testing.T) {
	if addr := os.Getenv(childEnv); addr != "" { // this process runs as the other user
		ln, err := Listen(t.Context(), "tcp4", addr, WithReusePort())
		switch {
		case err == nil:
			ln.Close()
			fmt.Println("joined")
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println("in use")
		default:
			t.Error(err)
		}
		return
	}
	needSpread(t)
	joins := func(addr string) bool {
		var out bytes.Buffer
		other := child(t, addr)
		other.Stdout = &out
		other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		err := other.Start()
		if errors.Is(err, syscall.EACCES) {
			t.Skipf("uid 65534 may not execute %s: copy this binary to where it may", other.Path)
		}
		require.NoError(t, err)
		require.NoError(t, other.Wait(), "%s", &out)
		joined := strings.HasPrefix(out.String(), "joined")
		require.True(t, joined || strings.HasPrefix(out.String(), "in use"), "%s", &out)
		return joined
	}
	one, err := ListenShards(t.Context(), "tcp4", "127.0.0.1:0", 2)
	require.NoError(t, err)
	defer one.Close()
	same, err := ListenTCP(one.Addr().String(), WithReusePort())
	require.NoError(t, err, "the same user can join")
	require.NoError(t, same.Close())
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user: run this test as root")
	}
	require.False(t, joins(one.Addr().String()))

	if jailed, err := unix.SysctlUint32("security.jail.jailed"); err == nil && jailed == 1 {
		t.Skip("in a jail the wildcard can mean a single address: run this test outside of it")
	}
	all, err := ListenShards(t.Context(), "tcp4", "0.0.0.0:0", 2)
	require.NoError(t, err)
	defer all.Close()
	joined := joins(all.Addr().String())
	release, err := unix.SysctlUint32("kern.osreldate")
	require.NoError(t, err)
	switch {
	case release < 1303000, release >= 1400097 && release <= 1400507:
		require.True(t, joined, "SECURITY.md says that another user can join")
	case release >= 1500068:
		require.False(t, joined, "SECURITY.md says that another user cannot join")
	default:
		t.Logf("%d: joined: %t; no other release of this branch has been tried", release, joined)
	}
}
