package e2e

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The option numbers in this package match those that x/sys has for FreeBSD.
func TestOptionNumbers(t *testing.T) {
	name, err := sockopt.ReusePort()
	require.NoError(t, err)
	require.Equal(t, unix.SO_REUSEPORT_LB, name)
	names, ok := sockopt.KeepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	var set []int
	k := sys.Real
	k.Sysctl = func(string) (uint32, error) { return 1, nil }
	k.SetsockoptInt = func(_, _, name, _ int) error {
		set = append(set, name)
		return nil
	}
	k.SetsockoptString = func(_, _, name int, _ string) error {
		set = append(set, name)
		return nil
	}
	require.NoError(t, sockopt.SetBeforeListen(&k, -1, &sockopt.Options{FastOpen: 1}))
	require.NoError(t, sockopt.SetAfterListen(&k, -1, &sockopt.Options{DeferAccept: 1}))
	require.Equal(t, []int{unix.TCP_FASTOPEN, unix.SO_ACCEPTFILTER}, set)
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
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReceiveBuffer(most))
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	_, err = acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReceiveBuffer(int(setting)))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "more than 8/9 of kern.ipc.maxsockbuf")
}

// At a limit of 5 the kernel holds back 6 of 14 silent clients and resets the older
// ones. The 6 are accepted once they have sent data.
func TestAcceptFilterResetsTheOldest(t *testing.T) {
	ln := listenFiltered(t, acceptq.WithBacklog(5), acceptq.WithDeferAccept(time.Second))
	var clients []*net.TCPConn
	for i := range 14 {
		clients = append(clients, testkit.Dial(t, ln.Addr()))
		want := min(i+1, 6)
		require.True(t, testkit.Eventually(func() bool { return incomplete(t, ln) == want }), "client %d", i)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, []int{0, 6}, []int{s.Queued, s.Incomplete})
	for i, c := range clients {
		if _, err := c.Write([]byte("x")); i >= 8 {
			require.NoError(t, err)
		}
	}
	require.True(t, testkit.Eventually(func() bool {
		s, err := ln.Stats()
		require.NoError(t, err)
		return s.Queued == 6 && s.Incomplete == 0
	}))
	var want, got []net.Addr
	for _, c := range clients[8:] {
		want = append(want, c.LocalAddr())
		got = append(got, testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr())
	}
	require.ElementsMatch(t, want, got)
}

func TestReusePortSpreads(t *testing.T) {
	testkit.NeedSpread(t)
	first := bsdListen(t, "127.0.0.1:0", acceptq.WithReusePort())
	second := bsdListen(t, first.Addr().String(), acceptq.WithReusePort())
	_, err := acceptq.ListenTCP(first.Addr().String())
	require.ErrorIs(t, err, unix.EADDRINUSE)

	accepted := make(chan int, 2)
	for _, ln := range []*acceptq.Listener{first, second} {
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
		require.NoError(t, client.SetReadDeadline(time.Now().Add(testkit.TooLong)))
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
