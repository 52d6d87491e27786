package acceptq

import (
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// listenOn listens on host, which a bare kernel may not have.
func listenOn(t *testing.T, host string, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP(net.JoinHostPort(host, "0"), opts...)
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Skipf("lo0 has no %s here: give it one with ifconfig(8)", host)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// needCeiling skips a test whose figures need a ceiling of n at least.
func needCeiling(t *testing.T, n uint32) (ceiling uint32) {
	t.Helper()
	ceiling, err := unix.SysctlUint32("kern.ipc.soacceptqueue")
	require.NoError(t, err)
	if ceiling < n {
		t.Skipf("kern.ipc.soacceptqueue is %d: sysctl kern.ipc.soacceptqueue=%d", ceiling, n)
	}
	return ceiling
}

// turnedAway connects one client to a full queue. Its handshake ends before the
// kernel looks at the queue; then it is reset.
func turnedAway(t *testing.T, addr net.Addr) {
	t.Helper()
	c, err := net.Dial(addr.Network(), addr.String())
	if err == nil {
		defer c.Close()
		require.NoError(t, c.SetReadDeadline(time.Now().Add(tooLong)))
		_, err = c.Read(make([]byte, 1))
	}
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// needReset skips a test in which a surplus client must learn of its fate.
func needReset(t *testing.T) {
	t.Helper()
	if reset, err := unix.SysctlUint32("net.inet.tcp.syncache.rst_on_sock_fail"); err == nil && reset == 0 {
		t.Skip("surplus clients are left in the dark: sysctl net.inet.tcp.syncache.rst_on_sock_fail=1")
	}
}

// A queue runs over: who survives is what Stats says.
func TestOverflowOfFreeBSD(t *testing.T) {
	needCeiling(t, 128)
	needReset(t)
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, row := range []struct{ b, holds int }{{0, 1}, {1, 2}, {2, 4}, {5, 8}, {10, 16}, {128, 193}} {
			if testing.Short() && row.b > 5 {
				continue
			}
			t.Run(host+" "+strconv.Itoa(row.b), func(t *testing.T) {
				ln := listenOn(t, host, WithBacklog(row.b))
				var clients []net.Conn
				for len(clients) < row.holds {
					clients = append(clients, connect(t, "tcp", ln.Addr().String()))
					queuedBecomes(t, len(clients), ln.Stats)
				}
				for range 3 {
					turnedAway(t, ln.Addr())
				}
				want := Stats{Queued: row.holds, Limit: row.b, Capacity: row.holds, Drops: unknown}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				require.Equal(t, row.holds, queueOption(t, ln, unix.SO_LISTENQLEN))
				require.Equal(t, row.b, queueOption(t, ln, unix.SO_LISTENQLIMIT))
				part, known := s.Utilization()
				require.True(t, known)
				require.Equal(t, 1.0, part)
				s, err = ReadStats(ln.TCPListener())
				require.NoError(t, err)
				require.Equal(t, want, s)

				for range clients {
					acceptAndExchange(t, ln, clients)
				}
				queuedBecomes(t, 0, ln.Stats)
			})
		}
	}
}

// What waits stays when the queue is made shorter, and clients are let in again
// when it is made longer; see also TestListenAgain.
func TestListeningAgainWithClientsQueued(t *testing.T) {
	needReset(t)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(10))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	turnedAway(t, ln.Addr())
	_, err := ln.SetBacklog(2)
	require.NoError(t, err)
	turnedAway(t, ln.Addr())
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Queued: 16, Limit: 2, Capacity: 4, Drops: unknown}, s)
	_, err = ln.SetBacklog(64)
	require.NoError(t, err)
	clients = append(clients, connect(t, "tcp", ln.Addr().String()))
	queuedBecomes(t, 17, ln.Stats)
	for range clients {
		acceptAndExchange(t, ln, clients)
	}
}

// Clients that an accept filter holds back are Incomplete, and not Queued.
func TestIncompleteOfFreeBSD(t *testing.T) {
	ln := listenFiltered(t, WithBacklog(5), WithAcceptFilter("dataready", ""))
	var clients []net.Conn
	for range 14 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
	}
	for _, c := range clients[:8] { // the oldest make room
		require.NoError(t, c.SetReadDeadline(time.Now().Add(tooLong)))
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == 0 && s.Incomplete == 6
	}, tooLong, time.Millisecond)
	require.Equal(t, 6, queueOption(t, ln, unix.SO_LISTENINCQLEN))
	for _, c := range clients[8:] {
		_, err := c.Write([]byte{'x'})
		require.NoError(t, err)
	}
	require.Zero(t, queuedBecomes(t, 6, ln.Stats).Incomplete)
}

func TestStrictSetBacklogOnFreeBSD(t *testing.T) {
	ceiling := int(needCeiling(t, 128))
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(100), WithStrictBacklog())
	b, err := ln.SetBacklog(ceiling + 1)
	var clamp *ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, ceiling, clamp.Limit)
	require.Equal(t, 100, b.Limit)
	require.Equal(t, 100, queueOption(t, ln, unix.SO_LISTENQLIMIT))
}

func TestReadSystemOfFreeBSD(t *testing.T) {
	s, err := ReadSystem()
	require.NoError(t, err)
	sysctl := func(name string) (n int) { // past the library, and of whatever width
		raw, err := unix.SysctlRaw(name)
		require.NoError(t, err, name)
		require.NotEmpty(t, raw, name)
		for i, b := range raw { // little-endian, as each port of Go to FreeBSD is
			n |= int(b) << (8 * i)
		}
		return n
	}
	require.Contains(t, []int{0, 1}, s.SYNCookies)
	require.Contains(t, []int{0, 1}, s.AbortOnOverflow)
	require.Positive(t, s.Ceiling)
	require.Equal(t, System{
		Ceiling: sysctl("kern.ipc.soacceptqueue"), Knob: "kern.ipc.soacceptqueue",
		SYNBacklog:      unknown,
		SYNCookies:      sysctl("net.inet.tcp.syncookies"),
		AbortOnOverflow: sysctl("net.inet.tcp.syncache.rst_on_sock_fail"),
		MigrateRequests: unknown,
		ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
	}, s)
}
