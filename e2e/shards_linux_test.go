package e2e

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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The same with a process that is stopped by a signal.
func TestShardsOfAStoppedProcess(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		serveShards(t)
		return
	}
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 128)
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
		conns := testkit.ConnectAll(t, addr, clients)
		queued := 0
		require.Eventually(t, func() bool {
			queued = 0
			for _, n := range testkit.KernelQueues(t) {
				queued += n
			}
			return queued == clients
		}, testkit.Patience, time.Millisecond, "they wait in the kernel")

		require.NoError(t, server.Process.Signal(unix.SIGCONT))
		require.NoError(t, testkit.AskAll(conns))
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
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 16)
	require.NoError(t, err)
	fmt.Println(s.Addr())
	served := make(chan error, 1)
	go func() { served <- s.Serve(testkit.Echo) }()
	_, err = io.Copy(io.Discard, os.Stdin)
	require.NoError(t, err)
	q, err := s.Stats()
	require.NoError(t, err)
	fmt.Printf("drops %d, queued %d\n", q.Drops, q.Queued)
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-served, net.ErrClosed)
}

// All shards have the same port, which the kernel chose, and the option. Clients of every
// family of the address can connect.
func TestShardsAddresses(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
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
			for _, opts := range [][]acceptq.Option{nil, {acceptq.WithReusePort()}} {
				t.Run(fmt.Sprintf("%s %s, %d options", test.network, test.address, len(opts)), func(t *testing.T) {
					s, err := acceptq.ListenShards(t.Context(), test.network, test.address, 3, opts...)
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
						require.NotZero(t, testkit.Option(t, l.TCPListener(), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_REUSEPORT}))
					}
					const clients = 60
					for _, host := range test.hosts {
						testkit.ConnectAll(t, &net.TCPAddr{IP: net.ParseIP(host), Port: want.Port}, clients)
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
	control := func(ends int) acceptq.Option {
		return acceptq.WithControl(func(string, string, syscall.RawConn) error {
			if calls++; calls == ends {
				return stop
			}
			return nil
		})
	}
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 3, control(0))
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Equal(t, 3, calls)

	calls = 0
	before := testkit.OpenDescriptors()
	s, err = acceptq.ListenTCPShards("127.0.0.1:0", 3, control(3))
	require.Nil(t, s)
	require.ErrorIs(t, err, stop)
	require.Equal(t, before, testkit.OpenDescriptors())

	// A context that ends while the shards are opened.
	calls = 0
	ctx, cancel := context.WithCancel(t.Context())
	s, err = acceptq.ListenShards(ctx, "tcp", "127.0.0.1:0", 3, acceptq.WithControl(func(string, string, syscall.RawConn) error {
		if calls++; calls == 2 {
			cancel()
		}
		return nil
	}))
	require.Nil(t, s)
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, 2, calls)
	require.Equal(t, before, testkit.OpenDescriptors())
}

// A single shard is exclusive like any listener. It shares the address only with
// WithReusePort.
func TestOneShardHasNoReusePort(t *testing.T) {
	for _, opts := range [][]acceptq.Option{nil, {acceptq.WithReusePort()}} {
		s, err := acceptq.ListenTCPShards("127.0.0.1:0", 1, opts...)
		require.NoError(t, err)
		defer s.Close()
		require.Equal(t, len(opts), testkit.Option(t, shardsOf(s)[0].TCPListener(), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_REUSEPORT}))
	}
}

// The same user can join shards with SO_REUSEPORT. Another user cannot.
func TestJoinShardsAsAnotherUser(t *testing.T) {
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
	require.NoError(t, err)
	defer s.Close()
	joined, err := acceptq.ListenTCP(s.Addr().String(), acceptq.WithReusePort())
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
		l, err := acceptq.ListenTCP(s.Addr().String(), acceptq.WithReusePort())
		if err == nil {
			l.Close()
		}
		errs <- err
	}()
	require.ErrorIs(t, <-errs, syscall.EADDRINUSE)
}

// If the descriptors run out, those already opened are closed again.
func TestMoreShardsThanDescriptors(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		var former unix.Rlimit
		require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &former))
		before := testkit.OpenDescriptors()
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: former.Max}))
		s, err := acceptq.ListenTCPShards("127.0.0.1:4321", math.MaxInt)
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &former))
		require.Nil(t, s)
		require.ErrorIs(t, err, syscall.EMFILE)
		require.Equal(t, before, testkit.OpenDescriptors())
		again, err := acceptq.ListenTCP("127.0.0.1:4321")
		require.NoError(t, err)
		require.NoError(t, again.Close())
	})
}

// The error of a drain whose ctx ends has the sums of all shards.
func TestShardsDrainError(t *testing.T) {
	const n, clients = 4, 100
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", n)
	require.NoError(t, err)
	defer s.Close()
	conns := testkit.ConnectAll(t, s.Addr(), clients)
	queuedBecomes(t, clients, s.Stats)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err = s.Drain(ctx)
	var cut *acceptq.DrainError
	require.ErrorAs(t, err, &cut)
	require.Equal(t, clients, cut.Queued)
	require.Equal(t, 0, cut.InFlight)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	// No client was lost by that: all are served, and then a drain succeeds.
	served := make(chan error, 1)
	go func() { served <- s.Serve(testkit.Echo) }()
	require.NoError(t, s.Drain(t.Context()))
	require.NoError(t, testkit.AskAll(conns))
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
		s, err := acceptq.ListenTCPShards(addr, shards, acceptq.WithReusePort())
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
		client := &http.Client{Timeout: testkit.Patience, Transport: &http.Transport{DisableKeepAlives: true}}
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
		require.Eventually(t, func() bool { return answered.Load() > seen+200 || len(lost) > 0 }, testkit.Patience, time.Millisecond)
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
	shards *acceptq.Shards
	served chan error
	early  testkit.Unanswered
}

func newWebServer(s *acceptq.Shards, answered *atomic.Int64) *webServer {
	w := &webServer{shards: s, served: make(chan error, 1), early: testkit.Unanswered{Conns: make(map[net.Conn]struct{})}}
	w.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { answered.Add(1) })
	w.ConnState = w.early.Note
	go func() { w.served <- s.Serve(w.Serve) }()
	return w
}

func (w *webServer) stop(ctx context.Context) error {
	if err := w.shards.Drain(ctx); err != nil {
		return err
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !w.early.None() {
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
