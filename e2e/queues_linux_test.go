package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// inodeOf returns the inode of a socket.
func inodeOf(t *testing.T, c syscall.Conn) uint64 {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	var s unix.Stat_t
	var serr error
	require.NoError(t, raw.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), &s) }))
	require.NoError(t, serr)
	return s.Ino
}

// queuesByInode lists all queues. Each socket occurs once.
func queuesByInode(t *testing.T) map[uint64]acceptq.Queue {
	t.Helper()
	all, err := acceptq.Queues(t.Context())
	require.NoError(t, err)
	found := make(map[uint64]acceptq.Queue)
	for _, q := range all {
		if former, twice := found[q.Inode]; twice {
			t.Errorf("listed twice: %v, %v", former, q)
		}
		found[q.Inode] = q
	}
	return found
}

// ssListeners lists the listeners of this namespace as ss does.
func ssListeners(t *testing.T) map[uint64]acceptq.Queue {
	t.Helper()
	if _, err := exec.LookPath("ss"); err != nil {
		testkit.SkipUnprivileged(t, "ss is missing: install iproute2")
	}
	out, err := exec.Command("ss", "-ltmneHO").CombinedOutput()
	require.NoError(t, err, "%s", out)
	line := regexp.MustCompile(`^LISTEN +(\d+) +(\d+) +(\S+):(\d+) .* ino:(\d+) .*skmem:\(.*,d(\d+)\)`)
	uid := regexp.MustCompile(` uid:(\d+) `)
	all := make(map[uint64]acceptq.Queue)
	number := func(text string) int {
		n, err := strconv.Atoi(text)
		require.NoError(t, err)
		return n
	}
	for text := range strings.Lines(string(out)) {
		f := line.FindStringSubmatch(text)
		require.NotNil(t, f, "%q", text)
		host, device, _ := strings.Cut(f[3], "%")
		if host == "*" { // a dual-stack socket
			host = "::"
		}
		addr := netip.MustParseAddr(strings.Trim(host, "[]")).Unmap()
		q := acceptq.Queue{
			Addr:   netip.AddrPortFrom(addr, uint16(number(f[4]))),
			V6Only: strings.Contains(text, " v6only:1 "),
			Device: device,
			Stats: acceptq.Stats{
				Queued: number(f[1]), Incomplete: -1, Limit: number(f[2]), Capacity: number(f[2]) + 1, Drops: int64(number(f[6])),
			},
			Inode: uint64(number(f[5])),
		}
		if u := uid.FindStringSubmatch(text); u != nil {
			q.UID = uint32(number(u[1]))
		}
		all[q.Inode] = q
	}
	return all
}

// Queues lists every listener, of both families, of a group, on a device and of MPTCP, with
// the numbers that the socket itself and ss report.
func TestQueuesAreThoseOfTheSockets(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		device := func(_, _ string, c syscall.RawConn) (err error) {
			require.NoError(t, c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "lo") }))
			return err
		}
		listeners := map[uint64]*acceptq.Listener{}
		add := func(l *acceptq.Listener, err error) *acceptq.Listener {
			require.NoError(t, err)
			t.Cleanup(func() { l.Close() })
			listeners[inodeOf(t, l)] = l
			return l
		}
		add(acceptq.Listen(t.Context(), "tcp", "127.0.0.1:0", acceptq.WithBacklog(7)))
		add(acceptq.Listen(t.Context(), "tcp", ":0", acceptq.WithBacklog(0)))
		only := add(acceptq.Listen(t.Context(), "tcp6", "[::1]:0"))
		bound := add(acceptq.Listen(t.Context(), "tcp4", "127.0.0.1:0", acceptq.WithControl(device)))
		wild6 := add(acceptq.Listen(t.Context(), "tcp6", "[::]:0"))
		full := add(acceptq.Listen(t.Context(), "tcp", "127.0.0.1:0", acceptq.WithBacklog(2)))
		fillOneByOne(t, full, 3)

		shards, err := acceptq.ListenShards(t.Context(), "tcp", "127.0.0.1:0", 8, acceptq.WithBacklog(100))
		require.NoError(t, err)
		defer shards.Close()
		testkit.ConnectAll(t, shards.Addr(), 50)
		for l := range shards.All() {
			listeners[inodeOf(t, l)] = l
		}

		found := queuesByInode(t)
		require.Len(t, found, len(listeners))
		require.Equal(t, ssListeners(t), found)
		for inode, l := range listeners {
			s, err := l.Stats()
			require.NoError(t, err)
			q := found[inode]
			require.Equal(t, s, q.Stats)
			require.Equal(t, l.Addr().String(), q.Addr.String())
			require.EqualValues(t, os.Getuid(), q.UID)
			require.Equal(t, inode == inodeOf(t, only) || inode == inodeOf(t, wild6), q.V6Only)
			require.Equal(t, inode == inodeOf(t, bound), q.Device == "lo")
		}
		all, err := acceptq.Queues(t.Context())
		require.NoError(t, err)
		require.Equal(t, inodeOf(t, full), all[0].Inode, "the fullest is the first")
		require.True(t, slices.IsSortedFunc(all, func(a, b acceptq.Queue) int {
			x, _ := a.Stats.Utilization()
			y, _ := b.Stats.Utilization()
			return int(1e9 * (y - x))
		}))
		require.Equal(t, testkit.KernelCounter(t, "ListenDrops"), all[0].Stats.Drops)

		for l := range shards.All() {
			group, err := l.Group(t.Context())
			require.NoError(t, err)
			require.Len(t, group, 8)
			queued := 0
			for _, q := range group {
				require.Contains(t, listeners, q.Inode)
				require.Equal(t, shards.Addr().String(), q.Addr.String())
				queued += q.Stats.Queued
			}
			require.Equal(t, 50, queued)
		}
		group, err := full.Group(t.Context())
		require.NoError(t, err)
		require.Equal(t, []acceptq.Queue{found[inodeOf(t, full)]}, group)
	})
}

// A group is that of one address, family and device. Its members may be in another process,
// and in another network namespace than the caller.
func TestGroupOfAnAddress(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		other := testkit.NewVisited(t)
		var one, two *acceptq.Listener
		other.In(func() {
			var err error
			one, err = acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort())
			require.NoError(t, err)
			two, err = acceptq.ListenTCP(one.Addr().String(), acceptq.WithReusePort())
			require.NoError(t, err)
			port := one.Addr().(*net.TCPAddr).Port
			for _, address := range []string{"127.0.0.2:%d", "[::1]:%d"} {
				ln, err := acceptq.ListenTCP(fmt.Sprintf(address, port), acceptq.WithReusePort())
				require.NoError(t, err)
				t.Cleanup(func() { ln.Close() })
			}
		})
		defer one.Close()
		defer two.Close()
		all, err := acceptq.Queues(t.Context())
		require.NoError(t, err)
		require.Empty(t, all, "the sockets are in another namespace")
		group, err := one.Group(t.Context())
		require.NoError(t, err)
		require.Len(t, group, 2)
		require.ElementsMatch(t, []uint64{inodeOf(t, one), inodeOf(t, two)}, []uint64{group[0].Inode, group[1].Inode})
	})
}

// listenMapped listens on an IPv6 socket with an IPv4-mapped address, which package net does
// not make.
func listenMapped(t *testing.T) net.Listener {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	at := unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
	require.NoError(t, unix.Bind(fd, &at))
	require.NoError(t, unix.Listen(fd, 5))
	ln, err := net.FileListener(f)
	require.NoError(t, err)
	return ln
}

// The clients that wait in a queue are those that its Listener lists, for every kind of
// address.
func TestWaitingInAQueue(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, address := range []string{"127.0.0.1:0", "[::ffff:127.0.0.1]:0", "[::1]:0", ":0"} {
			var l *acceptq.Listener
			if strings.HasPrefix(address, "[::ffff") {
				l = mustWrap(t, listenMapped(t))
			} else {
				ln, err := net.Listen("tcp", address)
				require.NoError(t, err, address)
				l = mustWrap(t, ln)
			}
			defer l.Close()
			dialed(t, l, 3)
			q := queuesByInode(t)[inodeOf(t, l)]
			all, err := q.Waiting(t.Context())
			require.NoError(t, err, address)
			want, err := l.Waiting(t.Context())
			require.NoError(t, err)
			require.Len(t, want, 3, address)
			for _, list := range [][]acceptq.Waiting{want, all} { // time goes on, so it is compared with a bound only
				for i := range list {
					require.Less(t, list[i].Waited, testkit.Patience)
					list[i].Waited = 0
				}
			}
			require.ElementsMatch(t, want, all, address)

			require.NoError(t, l.Close())
			_, err = q.Waiting(t.Context())
			require.ErrorIs(t, err, errors.ErrUnsupported, "the socket does not exist any more")
		}
	})
}

// A Go server listens with MPTCP by default. Its queue is listed once, under the inode that
// its process has.
func TestQueuesOfMPTCP(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer ln.Close()
		testkit.Connect(t, "tcp", ln.Addr().String())
		requireKernelQueue(t, ln.Addr(), 1)
		want, err := acceptq.ReadStats(ln.(*net.TCPListener))
		require.NoError(t, err)
		if want.Drops == -1 { // MPTCP
			want.Drops = 0
		}
		require.Equal(t, want, queuesByInode(t)[inodeOf(t, ln.(*net.TCPListener))].Stats)
	})
}

// Beside thousands of connections and while listeners come and go, each listener that stays
// is listed once in every call.
func TestQueuesWhileListenersComeAndGo(t *testing.T) {
	t.Parallel()
	listeners, clients, calls := 1000, 2000, 20
	if testing.Short() {
		listeners, clients, calls = 100, 100, 5
	}
	testkit.InNamespace(t, func(t *testing.T) {
		var limit unix.Rlimit
		require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		if need := uint64(listeners + 2*clients + 200); limit.Cur < need {
			t.Skipf("%d descriptors are allowed, the test needs %d", limit.Cur, need)
		}
		stay := map[uint64]bool{}
		var last *acceptq.Listener
		for range listeners {
			ln, err := acceptq.ListenTCP("127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
			stay[inodeOf(t, ln)], last = true, ln
		}
		testkit.ConnectAll(t, last.Addr(), clients)

		stop := make(chan struct{})
		var churn sync.WaitGroup
		churn.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if ln, err := acceptq.ListenTCP("127.0.0.1:0"); err == nil {
					ln.Close()
				}
			}
		})
		for range calls {
			found := queuesByInode(t)
			for inode := range stay {
				if _, listed := found[inode]; !listed {
					t.Errorf("a listener that stays is not listed: inode %d", inode)
				}
			}
			require.Equal(t, clients, found[inodeOf(t, last)].Stats.Queued)
		}
		close(stop)
		churn.Wait()
	})
}
