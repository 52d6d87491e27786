package e2e

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestReadSystem(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		counters := func() (n [4]int64) {
			for i, name := range []string{"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies"} {
				n[i] = testkit.KernelCounter(t, name)
			}
			return n
		}
		read := func() acceptq.System {
			t.Helper()
			before := counters()
			s, err := acceptq.ReadSystem()
			require.NoError(t, err)
			after := counters()
			for i, got := range []int64{s.ListenOverflows, s.ListenDrops, s.ReqQFullDrop, s.ReqQFullDoCookies} {
				require.GreaterOrEqual(t, got, before[i])
				require.LessOrEqual(t, got, after[i])
			}
			for name, got := range map[string]int{
				"core/somaxconn":             s.Ceiling,
				"ipv4/tcp_max_syn_backlog":   s.SYNBacklog,
				"ipv4/tcp_syncookies":        s.SYNCookies,
				"ipv4/tcp_abort_on_overflow": s.AbortOnOverflow,
				"ipv4/tcp_migrate_req":       s.MigrateRequests,
			} {
				text, err := os.ReadFile("/proc/sys/net/" + name)
				require.NoError(t, err)
				require.Equal(t, strings.TrimSpace(string(text)), strconv.Itoa(got), name)
			}
			return s
		}
		require.Equal(t, "net.core.somaxconn", read().Knob)
		testkit.SetSysctl(t, "net.core.somaxconn", 77)
		testkit.SetSysctl(t, "net.ipv4.tcp_max_syn_backlog", 4321)
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2)
		testkit.SetSysctl(t, "net.ipv4.tcp_abort_on_overflow", 1)
		testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		require.Equal(t, acceptq.System{
			Ceiling: 77, Knob: "net.core.somaxconn", SYNBacklog: 4321, SYNCookies: 2, AbortOnOverflow: 1, MigrateRequests: 1,
		}, read(), "nothing of the first reading is kept")

		// Each counter is tested with an event that increments it.
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 1)
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(0))
		require.NoError(t, err)
		defer ln.Close()
		fillOneByOne(t, ln, 1)
		s := read()
		require.EqualValues(t, 1, s.ListenOverflows)
		require.EqualValues(t, 1, s.ListenDrops)
		require.Zero(t, s.ReqQFullDrop)
		require.Zero(t, s.ReqQFullDoCookies)

		require.Zero(t, fillSYNQueue(t, func() bool { return read().ReqQFullDoCookies > 0 }).ReqQFullDrop)
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 0)
		cookies := read().ReqQFullDoCookies
		require.Equal(t, cookies, fillSYNQueue(t, func() bool { return read().ReqQFullDrop > 0 }).ReqQFullDoCookies)
	})
}

// fillSYNQueue starts handshakes that the listener does not finish, until full reports that
// the SYN queue is full. The limit of the SYN queue is the backlog too.
func fillSYNQueue(t *testing.T, full func() bool) acceptq.System {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(1), acceptq.WithDeferAccept(30*time.Second))
	require.NoError(t, err)
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	for range 3 { // kernels before 2025 hold one, later kernels two
		clients.Go(func() {
			if c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String()); err == nil {
				<-ctx.Done()
				c.Close()
			}
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !full() {
		require.NoError(t, ctx.Err(), "the SYN queue never was full")
		<-tick.C
	}
	s, err := acceptq.ReadSystem()
	require.NoError(t, err)
	return s
}
