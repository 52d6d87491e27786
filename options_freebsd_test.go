package acceptq

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The numbers that x/sys has for FreeBSD only are those used here.
func TestOptionNumbers(t *testing.T) {
	name, err := reusePort()
	require.NoError(t, err)
	require.Equal(t, unix.SO_REUSEPORT_LB, name)
	names, ok := keepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	var set []int
	sys := realSystem
	sys.sysctl = func(string) (uint32, error) { return 1, nil }
	sys.setsockoptInt = func(_, _, name, _ int) error {
		set = append(set, name)
		return nil
	}
	sys.setsockoptString = func(_, _, name int, _ string) error {
		set = append(set, name)
		return nil
	}
	require.NoError(t, sys.setClosed(-1, &options{fastOpen: 1}))
	require.NoError(t, sys.setListening(-1, 10, &options{deferAccept: 1}))
	require.Equal(t, []int{unix.TCP_FASTOPEN, unix.SO_ACCEPTFILTER}, set)
}

// Whether the setting lets servers use it or not, the answer is true to it.
func TestFastOpenIsNotTakenInVain(t *testing.T) {
	const knob = "net.inet.tcp.fastopen.server_enable"
	on, err := unix.SysctlUint32(knob)
	if err != nil || on == 0 {
		_, err := ListenTCP("127.0.0.1:0", WithFastOpen(1))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	ln := listen(t, WithBacklog(10), WithFastOpen(5))
	v, err := rawInt(ln.raw, func(fd int) (int, error) { return unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN) })
	require.NoError(t, err)
	require.NotZero(t, v)
	_, err = ListenTCP("127.0.0.1:0", WithBacklog(10), WithFastOpen(6))
	require.ErrorIs(t, err, errors.ErrUnsupported, "the kernel's own count is half the limit")
}

// listenFiltered listens with dataready, or skips: its module may be absent, which is
// said, with the command that loads it.
func listenFiltered(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	if errors.Is(err, unix.ENOENT) {
		requireListenError(t, ln, err)
		require.ErrorContains(t, err, "kldload accf_data")
		require.Equal(t, before, openDescriptors())
		t.Skip("this kernel has no filter dataready: kldload accf_data")
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestAcceptFilterUnknown(t *testing.T) {
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", WithAcceptFilter("nosuchfilter", ""))
	require.ErrorIs(t, err, unix.ENOENT)
	require.ErrorContains(t, err, "nosuchfilter")
	requireListenError(t, ln, err)
	require.Equal(t, before, openDescriptors())
}

// A silent client waits outside of the queue, beside one that speaks.
func TestAcceptFilterActs(t *testing.T) {
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		t.Run(name, func(t *testing.T) {
			ln := listenFiltered(t, WithBacklog(5), opt)
			require.Equal(t, "dataready", filterOf(t, ln))

			silent := dial(t, ln.Addr())
			require.True(t, eventually(func() bool { return incomplete(t, ln) == 1 }))
			speaker := dial(t, ln.Addr())
			_, err := speaker.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, speaker.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr(), "who speaks is accepted first")
			require.Equal(t, 1, incomplete(t, ln))

			_, err = ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, "dataready", filterOf(t, ln), "listening again keeps it")
			_, err = silent.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, silent.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr())
			require.Zero(t, incomplete(t, ln))
		})
	}
}

// Of 14 silent clients 6 wait at a limit of 5, and the oldest are reset; those 6 come
// in once they have spoken.
func TestAcceptFilterResetsTheOldest(t *testing.T) {
	ln := listenFiltered(t, WithBacklog(5), WithDeferAccept(time.Second))
	var clients []*net.TCPConn
	for i := range 14 {
		clients = append(clients, dial(t, ln.Addr()))
		want := min(i+1, 6)
		require.True(t, eventually(func() bool { return incomplete(t, ln) == want }), "client %d", i)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, []int{0, 6}, []int{s.Queued, s.Incomplete})
	for i, c := range clients {
		if _, err := c.Write([]byte("x")); i >= 8 {
			require.NoError(t, err)
		}
	}
	require.True(t, eventually(func() bool {
		s, err := ln.Stats()
		require.NoError(t, err)
		return s.Queued == 6 && s.Incomplete == 0
	}))
	var want, got []net.Addr
	for _, c := range clients[8:] {
		want = append(want, c.LocalAddr())
		got = append(got, acceptBy(t, ln, ln.Accept).RemoteAddr())
	}
	require.ElementsMatch(t, want, got)
}

func incomplete(t *testing.T, ln *Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Incomplete
}
