package acceptq

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The option numbers in this package match those that x/sys has for FreeBSD.
func TestOptionNumbers(t *testing.T) {
	name, err := reusePort()
	require.NoError(t, err)
	require.Equal(t, unix.SO_REUSEPORT_LB, name)
	names, ok := keepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	var set []int
	k := realKernel
	k.sysctl = func(string) (uint32, error) { return 1, nil }
	k.setsockoptInt = func(_, _, name, _ int) error {
		set = append(set, name)
		return nil
	}
	k.setsockoptString = func(_, _, name int, _ string) error {
		set = append(set, name)
		return nil
	}
	require.NoError(t, k.setBeforeListen(-1, &settings{fastOpen: 1}))
	require.NoError(t, k.setAfterListen(-1, &settings{deferAccept: 1}))
	require.Equal(t, []int{unix.TCP_FASTOPEN, unix.SO_ACCEPTFILTER}, set)
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
	v, err := rawInt(ln.intake.raw, func(fd int) (int, error) { return unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN) })
	require.NoError(t, err)
	require.NotZero(t, v)
	_, err = ListenTCP("127.0.0.1:0", WithBacklog(10), WithFastOpen(6))
	require.ErrorIs(t, err, errors.ErrUnsupported, "the kernel's own count is half the limit")
}

// The largest buffer is 8/9 of the setting, and the error names that bound.
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

// filterHolds sets the filter dataready without the library. It reports whether the
// filter holds a silent client back, while a later client that sends data is accepted.
func filterHolds(t *testing.T) bool {
	t.Helper()
	ln := listen(t, WithBacklog(5))
	var filter [256]byte // struct accept_filter_arg
	copy(filter[:], "dataready")
	_, err := rawInt(ln.intake.raw, func(fd int) (int, error) {
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

// The library returns an error for filters exactly where the kernel ignores them. The
// library decides by the release; the test measures.
func TestFiltersWithoutEffectAreAnError(t *testing.T) {
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

// At a limit of 5 the kernel holds back 6 of 14 silent clients and resets the older
// ones. The 6 are accepted once they have sent data.
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

func TestReusePortSpreads(t *testing.T) {
	needSpread(t)
	first := bsdListen(t, "127.0.0.1:0", WithReusePort())
	second := bsdListen(t, first.Addr().String(), WithReusePort())
	_, err := ListenTCP(first.Addr().String())
	require.ErrorIs(t, err, unix.EADDRINUSE)

	accepted := make(chan int, 2)
	for _, ln := range []*Listener{first, second} {
		go func() {
			n := 0
			defer func() { accepted <- n }()
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				n++
				conn.Write([]byte("!"))
				conn.Close()
			}
		}()
	}
	const clients = 64 // that one listener gets them all has a chance of 1 in 2^63
	for range clients {
		client, err := bsdDial(t, first)
		require.NoError(t, err)
		require.NoError(t, client.SetReadDeadline(time.Now().Add(tooLong)))
		_, err = io.ReadFull(client, make([]byte, 1))
		require.NoError(t, err)
	}
	first.Close()
	second.Close()
	a, b := <-accepted, <-accepted
	require.Equal(t, clients, a+b)
	require.NotZero(t, a)
	require.NotZero(t, b)
}
