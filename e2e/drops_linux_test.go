package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/rawtcp"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The causes that the documentation of Drops lists, with the counters of the namespace.
// Each row is a listener of its own. Only the first two rows are a loss.
func TestCausesOfDrops(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 0)
		wire, err := rawtcp.Open()
		require.NoError(t, err)
		defer wire.Close()
		const n = 10
		for _, row := range []struct {
			name                   string
			opts                   []acceptq.Option
			do                     func(t *testing.T, ln *acceptq.Listener)
			drops, overflows, lost int64
			synQueueDrops          int64
		}{
			{"a full accept queue", []acceptq.Option{acceptq.WithBacklog(0)}, func(t *testing.T, ln *acceptq.Listener) {
				dialed(t, ln, 1)
				syns(t, wire, ln, n)
			}, n, n, n, 0},
			{"a full SYN queue", []acceptq.Option{acceptq.WithBacklog(0)}, func(t *testing.T, ln *acceptq.Listener) {
				syns(t, wire, ln, n+1)
			}, n, 0, n, n},
			{"a half-open health check", nil, func(t *testing.T, ln *acceptq.Listener) {
				for i := range n {
					ok, err := wire.HalfOpen(sender(i), server(ln))
					require.NoError(t, err)
					require.True(t, ok)
				}
			}, n, 0, 0, 0},
			{"a SYN that is sent again", nil, func(t *testing.T, ln *acceptq.Listener) {
				for range n + 1 {
					syns(t, wire, ln, 1)
				}
			}, n, 0, 0, 0},
			{"FIN", nil, flags(wire, n, rawtcp.FIN), n, 0, 0, 0},
			{"SYN and FIN", nil, flags(wire, n, rawtcp.SYN|rawtcp.FIN), n, 0, 0, 0},
			{"RST", nil, flags(wire, n, rawtcp.RST), n, 0, 0, 0},
			{"ECE and CWR", nil, flags(wire, n, rawtcp.ECE|rawtcp.CWR), n, 0, 0, 0},
			{"a deferred client", []acceptq.Option{acceptq.WithDeferAccept(time.Second)}, func(t *testing.T, ln *acceptq.Listener) {
				for range n {
					c := testkit.Connect(t, "tcp", ln.Addr().String())
					_, err := c.Write([]byte("x"))
					require.NoError(t, err)
					accept(t, ln).Close()
				}
			}, n, 0, 0, 0},
			{"a drain", nil, func(t *testing.T, ln *acceptq.Listener) {
				require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
				syns(t, wire, ln, n)
			}, n, 0, 0, 0},
			{"a client", nil, func(t *testing.T, ln *acceptq.Listener) {
				for range n {
					testkit.Connect(t, "tcp", ln.Addr().String())
					accept(t, ln).Close()
				}
			}, 0, 0, 0, 0},
		} {
			t.Run(row.name, func(t *testing.T) {
				ln, err := acceptq.ListenTCP("127.0.0.1:0", row.opts...)
				require.NoError(t, err)
				defer ln.Close()
				before, err := acceptq.ReadSystem()
				require.NoError(t, err)
				row.do(t, ln)
				var s acceptq.Stats
				require.Eventually(t, func() bool {
					s, err = ln.Stats()
					return err == nil && s.Drops >= row.drops
				}, testkit.Patience, time.Millisecond, "%v", &s)
				require.Equal(t, row.drops, s.Drops)
				after, err := acceptq.ReadSystem()
				require.NoError(t, err)
				require.Equal(t, row.overflows, after.ListenOverflows-before.ListenOverflows)
				require.Equal(t, row.lost, after.ListenDrops-before.ListenDrops)
				require.Equal(t, row.synQueueDrops, after.ReqQFullDrop-before.ReqQFullDrop)
			})
		}
	})
}

func server(ln *acceptq.Listener) netip.AddrPort { return netip.MustParseAddrPort(ln.Addr().String()) }

// sender returns the address of a client that the kernel does not answer for.
func sender(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 4000)
}

// syns sends the SYN of n clients.
func syns(t *testing.T, wire *rawtcp.Wire, ln *acceptq.Listener, n int) {
	t.Helper()
	for i := range n {
		require.NoError(t, wire.Send(rawtcp.Segment{From: sender(i), To: server(ln), Seq: 1, Flags: rawtcp.SYN}))
	}
}

func flags(wire *rawtcp.Wire, n int, set uint8) func(t *testing.T, ln *acceptq.Listener) {
	return func(t *testing.T, ln *acceptq.Listener) {
		for i := range n {
			require.NoError(t, wire.Send(rawtcp.Segment{From: sender(i), To: server(ln), Seq: 1, Flags: set}))
		}
	}
}
