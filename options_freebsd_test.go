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

// A shorter queue would take the count of fast open with it: SetBacklog refuses that
// and changes nothing.
func TestSetBacklogKeepsFastOpen(t *testing.T) {
	sys := willing()
	ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(10), WithFastOpen(5)})
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

// A buffer may have 8/9 of the setting, and the error names that bound.
func TestTheLargestBuffer(t *testing.T) {
	setting, err := unix.SysctlUint64("kern.ipc.maxsockbuf")
	if err != nil { // on a processor of 32 bits
		n, err := unix.SysctlUint32("kern.ipc.maxsockbuf")
		require.NoError(t, err)
		setting = uint64(n)
	}
	most := int(setting / 9 * 8)
	ln, err := ListenTCP("127.0.0.1:0", WithReceiveBuffer(most))
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	_, err = ListenTCP("127.0.0.1:0", WithReceiveBuffer(int(setting)))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "more than 8/9 of kern.ipc.maxsockbuf")
}

// filterHolds sets the filter dataready past the library, and says whether a
// silent client is accepted before one that came later and speaks.
func filterHolds(t *testing.T) bool {
	t.Helper()
	ln := listen(t, WithBacklog(5))
	var filter [256]byte // struct accept_filter_arg
	copy(filter[:], "dataready")
	_, err := rawInt(ln.raw, func(fd int) (int, error) {
		return 0, unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_ACCEPTFILTER, string(filter[:]))
	})
	if errors.Is(err, unix.ENOENT) {
		t.Skip("this kernel has no filter dataready: kldload accf_data")
	}
	require.NoError(t, err)
	silent, speaker := dial(t, ln.Addr()), dial(t, ln.Addr())
	_, err = speaker.Write([]byte("x"))
	require.NoError(t, err)
	first := acceptBy(t, ln, ln.Accept).RemoteAddr().String()
	require.Contains(t, []string{silent.LocalAddr().String(), speaker.LocalAddr().String()}, first)
	return first == speaker.LocalAddr().String()
}

// The library refuses filters where the kernel ignores them, and only there. It goes
// by the release, the test by what happens.
func TestFiltersAreRefusedWhereTheyDoNothing(t *testing.T) {
	holds := filterHolds(t)
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		before := openDescriptors()
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
		require.Equal(t, before, openDescriptors())
	}
}

// needFilters skips a test on a kernel that ignores filters.
func needFilters(t *testing.T) {
	t.Helper()
	if err := realSystem.mustFilter(); err != nil {
		t.Skip("see TestFiltersAreRefusedWhereTheyDoNothing:", err)
	}
}

// listenFiltered listens with dataready, or skips: its module may be absent, which is
// said, with the command that loads it.
func listenFiltered(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	needFilters(t)
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
	needFilters(t)
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
