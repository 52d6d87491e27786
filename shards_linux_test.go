package acceptq

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// kernelQueues reads the rows of the listeners in /proc/net/tcp and tcp6. It returns the
// number of queued connections of each socket, by inode.
func kernelQueues(t *testing.T) map[uint64]int {
	t.Helper()
	queues := make(map[uint64]int)
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" {
				continue
			}
			_, rx, _ := strings.Cut(f[4], ":")
			n, err := strconv.ParseInt(rx, 16, 64)
			require.NoError(t, err)
			inode, err := strconv.ParseUint(f[9], 10, 64)
			require.NoError(t, err)
			queues[inode] = int(n)
		}
	}
	return queues
}

func inode(t *testing.T, l *Listener) uint64 {
	t.Helper()
	var stat unix.Stat_t
	var operr error
	require.NoError(t, l.intake.raw.Control(func(fd uintptr) { operr = unix.Fstat(int(fd), &stat) }))
	require.NoError(t, operr)
	return stat.Ino
}

// agrees requires that the numbers of each shard and their sums match those of the kernel.
func agrees(t *testing.T, s *Shards) (sum Stats) {
	t.Helper()
	kernel := kernelQueues(t)
	var want Stats
	for l := range s.All() {
		q, err := l.Stats()
		require.NoError(t, err)
		queued, listens := kernel[inode(t, l)]
		require.True(t, listens)
		require.Equal(t, queued, q.Queued)
		want.Queued += queued
		want.Limit += q.Limit
		want.Capacity += q.Capacity
		want.Drops += q.Drops
	}
	sum, err := s.Stats()
	require.NoError(t, err)
	want.Incomplete = unknown
	require.Equal(t, want, sum)
	return sum
}

// With a fixed ceiling a stalled server keeps 129 of 1200 clients with one listener,
// and all of them with 16 shards.
func TestMoreQueueThanTheCeiling(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 128)

		one, err := ListenTCPShards("127.0.0.1:0", 1)
		require.NoError(t, err)
		defer one.Close()
		require.Len(t, connectUntilFull(t, one.Addr(), 200), 129)
		full := agrees(t, one)
		require.Equal(t, 129, full.Queued)
		require.Positive(t, full.Drops)

		const n, clients = 16, 1200
		s, err := ListenTCPShards("127.0.0.1:0", n)
		require.NoError(t, err)
		defer s.Close()
		require.Equal(t, n*128, s.EffectiveBacklog())
		overflows := kernelCounter(t, "ListenOverflows")
		conns := connectAll(t, s.Addr(), clients)
		queuedBecomes(t, clients, s.Stats)
		held := agrees(t, s)
		require.Equal(t, Stats{Queued: clients, Incomplete: unknown, Limit: n * 128, Capacity: n * 129}, held)
		require.Equal(t, overflows, kernelCounter(t, "ListenOverflows"))

		served := make(chan error, 1)
		go func() { served <- s.Serve(echo) }()
		require.NoError(t, askAll(conns))
		last := agrees(t, s)
		require.Zero(t, last.Queued)
		require.Zero(t, last.Drops)
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-served, net.ErrClosed)
	})
}

func askAll(conns []net.Conn) error {
	errs := make([]error, len(conns))
	each(len(conns), func(i int) { errs[i] = askEcho(conns[i]) })
	return errors.Join(errs...)
}

// The same with a process that is stopped by a signal.
func TestShardsOfAStoppedProcess(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		serveShards(t)
		return
	}
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 128)
		server := child(t, "to be chosen")
		in, err := server.StdinPipe()
		require.NoError(t, err)
		out, err := server.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, server.Start())
		ended := false
		defer func() {
			if !ended {
				server.Process.Kill()
				server.Wait()
			}
		}()
		lines := bufio.NewScanner(out)
		require.True(t, lines.Scan(), "no address")
		addr, err := net.ResolveTCPAddr("tcp", lines.Text())
		require.NoError(t, err)

		require.NoError(t, server.Process.Signal(unix.SIGSTOP))
		var status unix.WaitStatus
		_, err = unix.Wait4(server.Process.Pid, &status, unix.WUNTRACED, nil)
		require.NoError(t, err)
		require.True(t, status.Stopped())

		const clients = 1000
		conns := connectAll(t, addr, clients)
		queued := 0
		require.Eventually(t, func() bool {
			queued = 0
			for _, n := range kernelQueues(t) {
				queued += n
			}
			return queued == clients
		}, patience, time.Millisecond, "they wait in the kernel")

		require.NoError(t, server.Process.Signal(unix.SIGCONT))
		require.NoError(t, askAll(conns))
		require.NoError(t, in.Close())
		require.True(t, lines.Scan(), "no last line")
		require.Equal(t, "drops 0, queued 0", lines.Text())
		for lines.Scan() { // the child's own PASS
		}
		ended = true
		require.NoError(t, server.Wait())
	})
}

// serveShards is the server that is stopped. It prints its address. When its standard input
// ends, it prints its drops.
func serveShards(t *testing.T) {
	s, err := ListenTCPShards("127.0.0.1:0", 16)
	require.NoError(t, err)
	fmt.Println(s.Addr())
	served := make(chan error, 1)
	go func() { served <- s.Serve(echo) }()
	_, err = io.Copy(io.Discard, os.Stdin)
	require.NoError(t, err)
	q, err := s.Stats()
	require.NoError(t, err)
	fmt.Printf("drops %d, queued %d\n", q.Drops, q.Queued)
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-served, net.ErrClosed)
}

// A full shard drops clients while another shard has room. The drops show which shard.
func TestAFullShardDrops(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		const n, limit = 8, 4
		s, err := ListenTCPShards("127.0.0.1:0", n, WithBacklog(limit))
		require.NoError(t, err)
		defer s.Close()
		in := connectUntilFull(t, s.Addr(), n*(limit+1)+1)
		require.LessOrEqual(t, len(in), n*(limit+1))
		sum := agrees(t, s)
		require.Equal(t, len(in), sum.Queued)
		require.Positive(t, sum.Drops)
		for l := range s.All() {
			q, err := l.Stats()
			require.NoError(t, err)
			if q.Drops > 0 {
				require.Equal(t, limit+1, q.Queued, "only a full one drops")
			}
		}
	})
}

// All shards have the same port, which the kernel chose, and the option. Clients of every
// family of the address can connect.
func TestShardsAddresses(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		const v4, v6 = "127.0.0.1", "::1"
		for _, test := range []struct {
			network, address string
			hosts            []string
		}{
			{"tcp", "127.0.0.1:0", []string{v4}},
			{"tcp", "[::1]:0", []string{v6}},
			{"tcp", ":0", []string{v4, v6}},
			{"tcp", "0.0.0.0:0", []string{v4, v6}}, // the same as net.Listen
			{"tcp", "[::]:0", []string{v4, v6}},
			{"tcp", "localhost:0", []string{v4}},
			{"tcp4", ":0", []string{v4}},
			{"tcp4", "127.0.0.1:0", []string{v4}},
			{"tcp6", ":0", []string{v6}},
			{"tcp6", "[::1]:0", []string{v6}},
			{"tcp", "127.0.0.1:4321", []string{v4}},
			{"tcp", ":4321", []string{v4, v6}},
		} {
			for _, opts := range [][]Option{nil, {WithReusePort()}} {
				t.Run(fmt.Sprintf("%s %s, %d options", test.network, test.address, len(opts)), func(t *testing.T) {
					s, err := ListenShards(t.Context(), test.network, test.address, 3, opts...)
					require.NoError(t, err)
					defer s.Close()
					plain, err := net.Listen(test.network, strings.Replace(test.address, "4321", "4322", 1))
					require.NoError(t, err)
					defer plain.Close()
					want := *plain.Addr().(*net.TCPAddr)
					want.Port = s.Addr().(*net.TCPAddr).Port
					require.NotZero(t, want.Port)
					for l := range s.All() {
						require.Equal(t, want.String(), l.Addr().String(), "the address of net.Listen, except for the port")
						require.NotZero(t, option(t, l.TCPListener(), socketOption{unix.SOL_SOCKET, unix.SO_REUSEPORT}))
					}
					const clients = 60
					for _, host := range test.hosts {
						connectAll(t, &net.TCPAddr{IP: net.ParseIP(host), Port: want.Port}, clients)
					}
					queuedBecomes(t, clients*len(test.hosts), s.Stats)
					for l := range s.All() {
						q, err := l.Stats()
						require.NoError(t, err)
						require.Positive(t, q.Queued)
					}
				})
			}
		}
	})
}

// The first shard reserves the address. No other socket is opened for that.
func TestShardsControl(t *testing.T) {
	calls := 0
	stop := errors.New("stop")
	control := func(ends int) Option {
		return WithControl(func(string, string, syscall.RawConn) error {
			if calls++; calls == ends {
				return stop
			}
			return nil
		})
	}
	s, err := ListenTCPShards("127.0.0.1:0", 3, control(0))
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Equal(t, 3, calls)

	calls = 0
	before := openDescriptors()
	s, err = ListenTCPShards("127.0.0.1:0", 3, control(3))
	require.Nil(t, s)
	require.ErrorIs(t, err, stop)
	require.Equal(t, before, openDescriptors())

	// A context that ends while the shards are opened.
	calls = 0
	ctx, cancel := context.WithCancel(t.Context())
	s, err = ListenShards(ctx, "tcp", "127.0.0.1:0", 3, WithControl(func(string, string, syscall.RawConn) error {
		if calls++; calls == 2 {
			cancel()
		}
		return nil
	}))
	require.Nil(t, s)
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, 2, calls)
	require.Equal(t, before, openDescriptors())
}

// A single shard is exclusive like any listener. It shares the address only with
// WithReusePort.
func TestOneShardHasNoReusePort(t *testing.T) {
	for _, opts := range [][]Option{nil, {WithReusePort()}} {
		s, err := ListenTCPShards("127.0.0.1:0", 1, opts...)
		require.NoError(t, err)
		defer s.Close()
		require.Equal(t, len(opts), option(t, shardsOf(s)[0].TCPListener(), socketOption{unix.SOL_SOCKET, unix.SO_REUSEPORT}))
	}
}

// The same user can join shards with SO_REUSEPORT. Another user cannot.
func TestJoinShardsAsAnotherUser(t *testing.T) {
	s, err := ListenTCPShards("127.0.0.1:0", 2)
	require.NoError(t, err)
	defer s.Close()
	joined, err := ListenTCP(s.Addr().String(), WithReusePort())
	require.NoError(t, err)
	require.NoError(t, joined.Close())
	if os.Geteuid() != 0 {
		return // only root can change to another user
	}
	errs := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
		_, _, errno := unix.RawSyscall(unix.SYS_SETREUID, math.MaxUint, 65534, 0)
		if errno != 0 {
			errs <- errno
			return
		}
		l, err := ListenTCP(s.Addr().String(), WithReusePort())
		if err == nil {
			l.Close()
		}
		errs <- err
	}()
	require.ErrorIs(t, <-errs, syscall.EADDRINUSE)
}

// If the descriptors run out, those already opened are closed again.
func TestMoreShardsThanDescriptors(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		var former unix.Rlimit
		require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &former))
		before := openDescriptors()
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: former.Max}))
		s, err := ListenTCPShards("127.0.0.1:4321", math.MaxInt)
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &former))
		require.Nil(t, s)
		require.ErrorIs(t, err, syscall.EMFILE)
		require.Equal(t, before, openDescriptors())
		again, err := ListenTCP("127.0.0.1:4321")
		require.NoError(t, err)
		require.NoError(t, again.Close())
	})
}

func TestShardsSetBacklog(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 128)
		const n = 4
		_, err := ListenTCPShards("127.0.0.1:4321", n, WithBacklog(129), WithStrictBacklog())
		var clamp *ClampError
		require.ErrorAs(t, err, &clamp)
		again, err := ListenTCP("127.0.0.1:4321")
		require.NoError(t, err, "no socket is left")
		require.NoError(t, again.Close())

		s, err := ListenTCPShards("127.0.0.1:4321", n, WithBacklog(5), WithStrictBacklog())
		require.NoError(t, err)
		defer s.Close()
		for _, limit := range []int{64, 3, 128} {
			require.NoError(t, s.SetBacklog(limit))
			require.Equal(t, n*limit, s.EffectiveBacklog())
			require.Equal(t, n*limit, agrees(t, s).Limit)
		}
		require.ErrorAs(t, s.SetBacklog(4096), &clamp)
		require.Equal(t, n*128, agrees(t, s).Limit, "with WithStrictBacklog the limit must stay")

		require.NoError(t, shardsOf(s)[2].Close())
		require.ErrorIs(t, s.SetBacklog(7), net.ErrClosed)
		q, err := s.Stats()
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, unknownStats, q)
		require.ErrorIs(t, s.Close(), net.ErrClosed)
		for l := range s.All() {
			require.ErrorIs(t, l.Close(), net.ErrClosed, "the other shards must be closed too")
		}
	})
}

// A sum with an unknown part is unknown: here the drops of an MPTCP listener.
func TestShardsStatsWithAnUnknownPart(t *testing.T) {
	s := apart(t, 2)
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(true)
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l, err := Wrap(ln)
	require.NoError(t, err)
	s.listeners = append(shardsOf(s), l)
	if option(t, l.TCPListener(), socketOption{unix.SOL_SOCKET, unix.SO_PROTOCOL}) == unix.IPPROTO_TCP {
		return // a kernel without MPTCP
	}
	q, err := s.Stats()
	require.NoError(t, err)
	require.EqualValues(t, unknown, q.Drops)
	require.Zero(t, q.Queued)
	require.Positive(t, q.Limit)
}

// The error of a drain whose ctx ends has the sums of all shards.
func TestShardsDrainError(t *testing.T) {
	const n, clients = 4, 100
	s, err := ListenTCPShards("127.0.0.1:0", n)
	require.NoError(t, err)
	defer s.Close()
	conns := connectAll(t, s.Addr(), clients)
	queuedBecomes(t, clients, s.Stats)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err = s.Drain(ctx)
	var cut *DrainError
	require.ErrorAs(t, err, &cut)
	require.Equal(t, clients, cut.Queued)
	require.Equal(t, 0, cut.InFlight)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	// No client was lost by that: all are served, and then a drain succeeds.
	served := make(chan error, 1)
	go func() { served <- s.Serve(echo) }()
	require.NoError(t, s.Drain(t.Context()))
	require.NoError(t, askAll(conns))
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-served, net.ErrClosed)
	require.ErrorIs(t, s.Drain(t.Context()), net.ErrClosed)
	var none context.Context
	require.Error(t, s.Drain(none))
}

// Generations of a web server follow each other on one address under constant load, and
// no client gets an error. If a client connects to a draining shard, its kernel retries
// after a second. That is the only effect.
func TestShardsDrainUnderLoad(t *testing.T) {
	const shards, generations, crowd = 4, 4, 8
	var answered atomic.Int64
	generation := func(addr string) *webServer {
		s, err := ListenTCPShards(addr, shards, WithReusePort())
		require.NoError(t, err)
		return newWebServer(s, &answered)
	}
	server := generation("127.0.0.1:0")
	addr := server.shards.Addr().String()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	lost := make(chan error, crowd)
	for range crowd {
		client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
		clients.Go(func() {
			for range 100_000 {
				if ctx.Err() != nil {
					return
				}
				resp, err := client.Get("http://" + addr)
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				if err != nil {
					lost <- err
					return
				}
			}
		})
	}
	for range generations {
		seen := answered.Load()
		require.Eventually(t, func() bool { return answered.Load() > seen+200 || len(lost) > 0 }, patience, time.Millisecond)
		next := generation(addr)
		require.NoError(t, server.stop(t.Context()))
		server = next
	}
	cancel()
	clients.Wait()
	close(lost)
	for err := range lost {
		require.NoError(t, err)
	}
	require.NoError(t, server.stop(t.Context()))
	t.Logf("%d answers, none lost in %d restarts", answered.Load(), generations)
}

// webServer is a web server that stops without losing a client: it drains its shards, waits
// for the first answer on each connection, and then calls Shutdown.
type webServer struct {
	http.Server
	shards *Shards
	served chan error
	early  unanswered
}

func newWebServer(s *Shards, answered *atomic.Int64) *webServer {
	w := &webServer{shards: s, served: make(chan error, 1), early: unanswered{conns: make(map[net.Conn]struct{})}}
	w.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { answered.Add(1) })
	w.ConnState = w.early.note
	go func() { w.served <- s.Serve(w.Serve) }()
	return w
}

func (w *webServer) stop(ctx context.Context) error {
	if err := w.shards.Drain(ctx); err != nil {
		return err
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !w.early.none() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := w.Shutdown(ctx); err != nil {
		return err
	}
	if err := <-w.served; err != http.ErrServerClosed {
		return fmt.Errorf("Serve returned %w, and not http.ErrServerClosed itself", err)
	}
	return nil
}
