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

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestConstantsAreOfTheSystem(t *testing.T) {
	require.Equal(t, unix.SO_LISTENQLIMIT, soListenQueueLimit)
	name, err := sockopt.ReusePort()
	require.NoError(t, err)
	require.Equal(t, unix.SO_REUSEPORT_LB, name)
}

// queueOption reads a socket option about the queue of ln, without the library.
func queueOption(t *testing.T, ln *Listener, name int) int {
	t.Helper()
	return testkit.Option(t, ln.TCPListener(), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: name})
}

// The result matches the setting, whether it allows Fast Open for servers or not.
func TestFastOpenWithoutEffectIsAnError(t *testing.T) {
	const knob = "net.inet.tcp.fastopen.server_enable"
	on, err := unix.SysctlUint32(knob)
	if err != nil || on == 0 {
		_, err := ListenTCP("127.0.0.1:0", WithFastOpen(1))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	ln := listen(t, WithBacklog(10), WithFastOpen(5))
	v, err := endpoint.RawInt(ln.intake.Raw, func(fd int) (int, error) { return unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN) })
	require.NoError(t, err)
	require.NotZero(t, v)
	_, err = ListenTCP("127.0.0.1:0", WithBacklog(10), WithFastOpen(6))
	require.ErrorIs(t, err, errors.ErrUnsupported, "the kernel's own count is half the limit")
}

// filterHolds sets the filter dataready without the library. It reports whether the
// filter holds a silent client back, while a later client that sends data is accepted.
func filterHolds(t *testing.T) bool {
	t.Helper()
	ln := listen(t, WithBacklog(5))
	var filter [256]byte // struct accept_filter_arg
	copy(filter[:], "dataready")
	_, err := endpoint.RawInt(ln.intake.Raw, func(fd int) (int, error) {
		return 0, unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_ACCEPTFILTER, string(filter[:]))
	})
	if errors.Is(err, unix.ENOENT) {
		t.Skip("this kernel has no filter dataready: kldload accf_data")
	}
	require.NoError(t, err)
	silent, speaker := testkit.Dial(t, ln.Addr()), testkit.Dial(t, ln.Addr())
	_, err = speaker.Write([]byte("x"))
	require.NoError(t, err)
	first := testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr().String()
	require.Contains(t, []string{silent.LocalAddr().String(), speaker.LocalAddr().String()}, first)
	return first == speaker.LocalAddr().String()
}

// The library returns an error for filters exactly where the kernel ignores them. The
// library decides by the release; the test measures.
func TestFiltersWithoutEffectAreAnError(t *testing.T) {
	holds := filterHolds(t)
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		before := testkit.OpenDescriptors()
		ln, err := ListenTCP("127.0.0.1:0", opt)
		if holds {
			require.NoError(t, err, name)
			require.NoError(t, ln.Close())
			continue
		}
		requireListenError(t, ln, err)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, name)
		require.ErrorContains(t, err, "kern.osreldate")
		require.Equal(t, before, testkit.OpenDescriptors())
	}
}

// Listening again lengthens and shortens the queue at once.
func TestListenAgain(t *testing.T) {
	ceiling, _, err := readBounds(&sys.Real)
	require.NoError(t, err)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(5))
	for _, step := range []struct{ n, limit int }{{50, 50}, {0, 0}, {-1, ceiling}, {10, 10}} {
		account := listenAgain(t, ln, step.n)
		require.Equal(t, step.limit, account.Limit)
		require.Equal(t, step.limit, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	}
}

// A shorter queue would also reduce the number of WithFastOpen. SetBacklog returns an
// error and changes nothing.
func TestSetBacklogKeepsFastOpen(t *testing.T) {
	k := willing()
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(10), WithFastOpen(5)})
	require.NoError(t, err)
	defer ln.Close()
	before := ln.Backlog()
	b, err := ln.SetBacklog(4)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "WithFastOpen(5): granted 2")
	require.Equal(t, before, b)
	require.Equal(t, 10, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	b, err = ln.SetBacklog(11)
	require.NoError(t, err)
	require.Equal(t, 11, b.Limit)
}

// The wildcard of both families is an error, because there the kernel gives all clients
// to one socket. The test shows both.
func TestNoShardsOfBothFamilies(t *testing.T) {
	testkit.NeedSpread(t)
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
	testkit.ConnectAll(t, v4, clients)
	queuedBecomes(t, clients, group.Stats)
	require.Eventually(t, func() bool {
		a, _ := shardsOf(group)[0].Stats()
		b, _ := shardsOf(group)[1].Stats()
		return max(a.Queued, b.Queued) == clients && min(a.Queued, b.Queued) == 0
	}, testkit.Patience, time.Millisecond, "the kernel spreads them: the library need not refuse")
}
