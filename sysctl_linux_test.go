package acceptq

import (
	"context"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// If the ceiling cannot be read, it is unknown and the error names the file. Listening
// still works.
func TestCeilingUnreadable(t *testing.T) {
	for _, tt := range []struct {
		rule string
		text string
		err  error // of reading the file
		want error
	}{
		{"no file", "", &fs.PathError{Op: "open", Path: "/proc/sys/net/core/somaxconn", Err: fs.ErrNotExist}, fs.ErrNotExist},
		{"no number in it", "many\n", nil, strconv.ErrSyntax},
		{"a number out of range", "-1\n", nil, strconv.ErrRange},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			k := realKernel
			k.readFile = func(string) ([]byte, error) { return []byte(tt.text), tt.err }
			predicted, err := k.predict(100)
			require.ErrorIs(t, err, tt.want)
			require.ErrorContains(t, err, "/proc/sys/net/core/somaxconn")
			require.Equal(t, Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, predicted)

			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: unknown, Limit: 1, Effective: 1, Capacity: 2, Measured: true}, ln.Backlog())
		})
	}
}

func TestReadSystem(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		counters := func() (n [4]int64) {
			for i, name := range []string{"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies"} {
				n[i] = kernelCounter(t, name)
			}
			return n
		}
		read := func() System {
			t.Helper()
			before := counters()
			s, err := ReadSystem()
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
		setSysctl(t, "net.core.somaxconn", 77)
		setSysctl(t, "net.ipv4.tcp_max_syn_backlog", 4321)
		setSysctl(t, "net.ipv4.tcp_syncookies", 2)
		setSysctl(t, "net.ipv4.tcp_abort_on_overflow", 1)
		setSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		require.Equal(t, System{
			Ceiling: 77, Knob: "net.core.somaxconn", SYNBacklog: 4321, SYNCookies: 2, AbortOnOverflow: 1, MigrateRequests: 1,
		}, read(), "nothing of the first reading is kept")

		// Each counter is tested with an event that increments it.
		setSysctl(t, "net.ipv4.tcp_syncookies", 1)
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(0))
		require.NoError(t, err)
		defer ln.Close()
		fillOneByOne(t, ln, 1)
		s := read()
		require.EqualValues(t, 1, s.ListenOverflows)
		require.EqualValues(t, 1, s.ListenDrops)
		require.Zero(t, s.ReqQFullDrop)
		require.Zero(t, s.ReqQFullDoCookies)

		require.Zero(t, fillSYNQueue(t, func() bool { return read().ReqQFullDoCookies > 0 }).ReqQFullDrop)
		setSysctl(t, "net.ipv4.tcp_syncookies", 0)
		cookies := read().ReqQFullDoCookies
		require.Equal(t, cookies, fillSYNQueue(t, func() bool { return read().ReqQFullDrop > 0 }).ReqQFullDoCookies)
	})
}

// fillSYNQueue starts handshakes that the listener does not finish, until full reports that
// the SYN queue is full. The limit of the SYN queue is the backlog too.
func fillSYNQueue(t *testing.T, full func() bool) System {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(1), WithDeferAccept(30*time.Second))
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
	s, err := ReadSystem()
	require.NoError(t, err)
	return s
}

// Each number that cannot be read is unknown. This is not an error.
func TestReadSystemWithoutFiles(t *testing.T) {
	whole := map[string]string{
		"/proc/sys/net/core/somaxconn":             "4096\n",
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   "2048\n",
		"/proc/sys/net/ipv4/tcp_syncookies":        "1\n",
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": "0\n",
		"/proc/sys/net/ipv4/tcp_migrate_req":       "1\n",
		"/proc/thread-self/net/netstat": "TcpExt: SyncookiesSent ListenOverflows ListenDrops TCPReqQFullDoCookies TCPReqQFullDrop\n" +
			"TcpExt: 9 11 12 13 14\n",
	}
	all := System{
		Ceiling: 4096, Knob: "net.core.somaxconn", SYNBacklog: 2048, SYNCookies: 1, AbortOnOverflow: 0, MigrateRequests: 1,
		ListenOverflows: 11, ListenDrops: 12, ReqQFullDrop: 14, ReqQFullDoCookies: 13,
	}
	without := map[string]func(*System){
		"":                                         func(*System) {},
		"/proc/sys/net/core/somaxconn":             func(s *System) { s.Ceiling = unknown },
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   func(s *System) { s.SYNBacklog = unknown },
		"/proc/sys/net/ipv4/tcp_syncookies":        func(s *System) { s.SYNCookies = unknown },
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": func(s *System) { s.AbortOnOverflow = unknown },
		"/proc/sys/net/ipv4/tcp_migrate_req":       func(s *System) { s.MigrateRequests = unknown },
		"/proc/thread-self/net/netstat": func(s *System) {
			s.ListenOverflows, s.ListenDrops, s.ReqQFullDrop, s.ReqQFullDoCookies = unknown, unknown, unknown, unknown
		},
	}
	for missing, forget := range without {
		for _, garbage := range []string{"", "\n", "-1\n", "many\n"} {
			k := realKernel
			k.readFile = func(name string) ([]byte, error) {
				text, ok := whole[name]
				switch {
				case !ok:
					t.Errorf("an unexpected file: %s", name)
					return nil, fs.ErrNotExist
				case name != missing:
					return []byte(text), nil
				case garbage == "":
					return nil, fs.ErrPermission
				}
				return []byte(garbage), nil
			}
			want := all
			forget(&want)
			got, err := k.readSystem()
			require.NoError(t, err)
			require.Equal(t, want, got, "without %q, %q instead", missing, garbage)
		}
	}
	k := realKernel
	k.readFile = func(string) ([]byte, error) { return nil, fs.ErrNotExist }
	want := all
	for _, forget := range without {
		forget(&want)
	}
	got, err := k.readSystem()
	require.NoError(t, err)
	require.Equal(t, want, got)
}
