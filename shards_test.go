package acceptq

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// BenchmarkShards compares accepting on one shard for each core with accepting on one
// listener. Both have the same number of loops. The time is from the first client until
// the last one is accepted. It includes the handshakes, which the clients make on the
// same cores.
func BenchmarkShards(b *testing.B) {
	const clients = 200
	cores := runtime.GOMAXPROCS(0)
	many, err := ListenTCPShards("127.0.0.1:0", max(cores, 2))
	if errors.Is(err, errors.ErrUnsupported) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer many.Close()
	// One listener also has several loops, so that the comparison is not one of loops.
	ln := listenForStats(b)
	one := new(Shards)
	for range many.Len() {
		one.listeners = append(shardsOf(one), ln)
	}

	accept := func(s *Shards) testkit.Side {
		accepted := make(chan net.Conn, clients)
		served := make(chan struct{})
		go func() {
			defer close(served)
			s.Serve(func(ln net.Listener) error {
				for {
					c, err := ln.Accept()
					if err != nil {
						return err
					}
					accepted <- c
				}
			})
		}()
		b.Cleanup(func() {
			s.Close()
			<-served
		})
		return func() time.Duration {
			var dialed [clients]net.Conn
			start := time.Now()
			var dialers sync.WaitGroup
			for d := range cores {
				dialers.Go(func() {
					for i := d; i < clients; i += cores {
						c, err := net.Dial("tcp", s.Addr().String())
						if err != nil {
							b.Error(err)
							return
						}
						c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
						dialed[i] = c
					}
				})
			}
			conns := make([]net.Conn, 0, clients)
			for range clients {
				select {
				case c := <-accepted:
					conns = append(conns, c)
				case <-time.After(testkit.Patience):
					b.Error("a client was not accepted")
					return time.Since(start)
				}
			}
			took := time.Since(start)
			dialers.Wait()
			for _, c := range append(dialed[:], conns...) {
				if c != nil {
					c.Close()
				}
			}
			return took
		}
	}
	single, shards := accept(one), accept(many)
	r := testkit.Ratios(b, single, single, shards)
	b.ReportMetric(1/r[0], "one/one")
	b.ReportMetric(1/r[1], "shards/one")
}

// shardClients is a number of clients with which each of four shards gets some and the
// length of each queue is known.
func shardClients() int {
	if runtime.GOOS == "dragonfly" {
		return 60 // DragonFly reports a maximum of 31 for each queue
	}
	return 200
}

func TestShardsAreCounted(t *testing.T) {
	for _, n := range []int{0, -1, -1 << 31} {
		s, err := ListenTCPShards("127.0.0.1:0", n)
		require.Nil(t, s)
		var op *net.OpError
		require.ErrorAs(t, err, &op, "n = %d", n)
		require.Equal(t, "listen", op.Op)
	}
	s, err := ListenShards(t.Context(), "udp", "127.0.0.1:0", 2)
	require.Nil(t, s)
	require.Error(t, err, "no TCP")
}

// A bad address gives the same error as Listen, for any number of shards.
func TestShardsOfABadAddress(t *testing.T) {
	if !testkit.Spreads() {
		t.Skip("shards are unsupported here")
	}
	for _, address := range []string{"127.0.0.1", "127.0.0.1:65536", "192.0.2.1:0"} {
		_, want := ListenTCP(address)
		for _, n := range []int{1, 2} {
			s, err := ListenTCPShards(address, n)
			require.Nil(t, s)
			testkit.RequireSameError(t, want, err)
		}
	}
}

// Only FreeBSD and DragonFly bound the number of shards.
func TestManyShards(t *testing.T) {
	if !testkit.Spreads() {
		t.Skip("shards are unsupported here")
	}
	const n = 258
	before := testkit.OpenDescriptors()
	s, err := ListenTCPShards("127.0.0.1:0", n)
	if runtime.GOOS == "freebsd" || runtime.GOOS == "dragonfly" {
		require.Nil(t, s)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, before, testkit.OpenDescriptors())
		return
	}
	require.NoError(t, err)
	require.Equal(t, n, s.Len())
	require.NoError(t, s.Close())
}

// One shard is a plain listener, and works on every system.
func TestOneShard(t *testing.T) {
	s, err := ListenTCPShards("127.0.0.1:0", 1, WithBacklog(7))
	require.NoError(t, err)
	defer s.Close()
	require.Equal(t, 1, s.Len())
	require.NotZero(t, s.Addr().(*net.TCPAddr).Port)
	only := slices.Collect(s.All())
	require.Len(t, only, 1)
	require.Equal(t, only[0].Addr(), s.Addr())
	require.Equal(t, only[0].EffectiveBacklog(), s.EffectiveBacklog())
	want, werr := only[0].Stats()
	got, gerr := s.Stats()
	require.Equal(t, want, got)
	require.Equal(t, werr, gerr)

	served := make(chan error, 1)
	go func() { served <- s.Serve(testkit.Echo) }()
	c, err := net.Dial("tcp", s.Addr().String())
	require.NoError(t, err)
	require.NoError(t, testkit.AskEcho(c))
	require.NoError(t, c.Close())
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-served, net.ErrClosed)
	requireAllClosed(t, s)
	require.Equal(t, only[0].EffectiveBacklog(), s.EffectiveBacklog(), "works after Close")
}

// Several shards share one address, and each gets clients. If the system would give all
// clients to one, listening fails.
func TestShardsEachGetClients(t *testing.T) {
	const n = 4
	clients := shardClients()
	s, err := ListenTCPShards("127.0.0.1:0", n)
	if !testkit.Spreads() {
		require.Nil(t, s)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		var op *net.OpError
		require.ErrorAs(t, err, &op)
		require.Equal(t, "listen", op.Op)
		return
	}
	require.NoError(t, err)
	defer s.Close()
	require.Equal(t, n, s.Len())
	for l := range s.All() {
		require.Equal(t, s.Addr(), l.Addr())
	}

	for _, c := range testkit.ConnectAll(t, s.Addr(), clients) {
		defer c.Close()
	}
	queuedBecomes(t, clients, s.Stats)
	for l := range s.All() {
		q, err := l.Stats()
		require.NoError(t, err)
		require.Positive(t, q.Queued, "one shard got none of %d clients", clients)
	}
}

// apart returns Shards whose listeners have different addresses. With it the tests of
// common methods run on systems without real shards.
func apart(t *testing.T, n int, opts ...Option) *Shards {
	t.Helper()
	s := new(Shards)
	t.Cleanup(func() { s.Close() })
	for range n {
		l, err := ListenTCP("127.0.0.1:0", opts...)
		require.NoError(t, err)
		s.listeners = append(shardsOf(s), l)
	}
	return s
}

func TestShardsOrder(t *testing.T) {
	s := apart(t, 3)
	require.Equal(t, shardsOf(s), slices.Collect(s.All()))
	for l := range s.All() {
		require.Same(t, shardsOf(s)[0], l)
		break // All stops when the loop does
	}
}

func TestSumWithAnUnknownPart(t *testing.T) {
	const known = 5
	itself := func(n int64) int64 { return n }
	require.EqualValues(t, unknown, sumOf(nil, itself), "a sum without parts")
	require.EqualValues(t, 0, sumOf([]int64{0, 0}, itself))
	require.EqualValues(t, known+2, sumOf([]int64{known, 2}, itself))
	require.EqualValues(t, unknown, sumOf([]int64{known, unknown, 2}, itself))
	require.EqualValues(t, unknown, sumOf([]int64{unknown, unknown}, itself), "not the sum of two -1")

	s := apart(t, 2, WithBacklog(known))
	shardsOf(s)[1].granted.Store(&Backlog{Requested: known, Limit: unknown, Effective: unknown, Capacity: unknown})
	require.Equal(t, unknown, s.EffectiveBacklog())
}

// The text of Shards is one line: the address and the number of shards.
func TestShardsInALog(t *testing.T) {
	s := apart(t, 3, WithBacklog(7))
	require.Equal(t, shardsOf(s)[0].String()+", 3 shards", fmt.Sprint(s))
	one := shardsOf(s)[0].Backlog()
	require.Equal(t, Backlogs{one, one, one}, s.Backlogs())
	require.NotContains(t, s.Backlogs().String(), "\n")

	linux, _ := ruleOf("linux")
	known, clamped := linux.account(4, 128, 4, true), linux.account(4, 2, 2, true)
	predicted := linux.account(4, 128, 4, false)
	for _, row := range []struct {
		all        Backlogs
		line, json string
	}{
		{Backlogs{known, known, known}, fmt.Sprintf("backlog: 3 queues hold 15, each: %v", known.describe()),
			`{"queues":3,"requested":12,"ceiling":128,"limit":12,"effective":12,"capacity":15,"measured":true,"clamped":false}`},
		{Backlogs{known}, known.String(),
			`{"queues":1,"requested":4,"ceiling":128,"limit":4,"effective":4,"capacity":5,"measured":true,"clamped":false}`},
		{Backlogs{known, clamped, known}, fmt.Sprintf("backlog: 3 queues hold 13; 2: %v; 1: %v", known.describe(), clamped.describe()),
			`{"queues":3,"requested":12,"ceiling":128,"limit":10,"effective":10,"capacity":13,"measured":true,"clamped":true}`},
		{Backlogs{clamped, predicted}, fmt.Sprintf("backlog: 2 queues hold 8; 1: %v; 1: %v", clamped.describe(), predicted.describe()),
			`{"queues":2,"requested":8,"ceiling":128,"limit":6,"effective":6,"capacity":8,"measured":false,"clamped":true}`},
		{Backlogs{known, noBacklog}, fmt.Sprintf("backlog: 2 queues hold unknown; 1: %v; 1: %v", known.describe(), noBacklog.describe()),
			`{"queues":2,"measured":false,"clamped":false}`},
		{Backlogs{{}, {}}, "backlog: 2 queues hold unknown, each: nothing known",
			`{"queues":2,"measured":false,"clamped":false}`},
		{nil, "backlog: nothing known", `{"queues":0,"measured":false,"clamped":false}`},
	} {
		require.Equal(t, row.line, row.all.String())
		var log bytes.Buffer
		slog.New(slog.NewJSONHandler(&log, nil)).Info("", "backlogs", row.all)
		require.Contains(t, log.String(), `"backlogs":`+row.json+"}\n")

		text, err := json.Marshal(row.all)
		require.NoError(t, err)
		var back Backlogs
		require.NoError(t, json.Unmarshal(text, &back))
		require.Len(t, back, len(row.all))
		for i := range back {
			require.Equal(t, orNothing(row.all[i], noBacklog), back[i])
		}
	}
}

// Close closes all shards and returns the first error.
func TestShardsCloseReturnsTheFirstError(t *testing.T) {
	if testkit.OnFakeNet {
		t.Skip("a second Close does not fail here")
	}
	s := apart(t, 4)
	require.NoError(t, shardsOf(s)[1].Close())
	require.NoError(t, shardsOf(s)[2].Close())
	want := shardsOf(s)[2].Close() // shards are closed from the last to the first
	require.ErrorIs(t, want, net.ErrClosed)
	require.NotEqual(t, want, shardsOf(s)[1].Close())
	require.Equal(t, want, s.Close())
	requireAllClosed(t, s)
}

func TestZeroShards(t *testing.T) {
	for _, s := range []*Shards{nil, {}} {
		zeroShards(t, s)
	}
}

func zeroShards(t *testing.T, s *Shards) {
	require.Equal(t, "tcp <nil>, no shards", s.String())
	require.Empty(t, s.Backlogs())
	require.Zero(t, s.Len())
	require.Empty(t, slices.Collect(s.All()))
	require.Nil(t, s.Addr())
	require.Equal(t, unknown, s.EffectiveBacklog())
	stats, err := s.Stats()
	require.Equal(t, unknownStats, stats)
	require.ErrorIs(t, err, sys.ErrNotListening)
	accounts, err := s.SetBacklog(1)
	require.Empty(t, accounts)
	require.ErrorIs(t, err, sys.ErrNotListening)
	require.ErrorIs(t, s.Drain(t.Context()), sys.ErrNotListening)
	require.ErrorIs(t, s.Close(), sys.ErrNotListening)
	require.ErrorIs(t, s.Serve(func(net.Listener) error { panic("there is none to serve") }), sys.ErrNotListening)
}

// Serve returns the first error of the serve functions unchanged, after all have
// returned. It closes the listeners to end the others.
func TestServeReturnsTheFirstError(t *testing.T) {
	first := errors.New("first")
	for _, want := range []error{first, nil} {
		s := apart(t, 3)
		var (
			mu       sync.Mutex
			returned int
		)
		begun := make(chan struct{}, s.Len())
		err := s.Serve(func(ln net.Listener) error {
			begun <- struct{}{}
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				returned++
			}()
			if ln == shardsOf(s)[1] {
				for range s.Len() {
					<-begun
				}
				return want
			}
			_, err := ln.Accept()
			return err
		})
		require.True(t, err == want, "%v, wanted %v", err, want)
		require.Equal(t, s.Len(), returned)
		requireAllClosed(t, s)
	}
}

// Serve returns http.ErrServerClosed unchanged, so that the usual comparison works.
func TestServeHTTP(t *testing.T) {
	n := 3
	if !testkit.Spreads() {
		n = 1
	}
	for name, end := range map[string]func(*http.Server) error{
		"Shutdown": func(srv *http.Server) error { return srv.Shutdown(context.Background()) },
		"Close":    func(srv *http.Server) error { return srv.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			s, err := ListenTCPShards("127.0.0.1:0", n)
			require.NoError(t, err)
			defer s.Close()
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(w, r.Body)
			})}
			served := make(chan error, 1)
			go func() { served <- s.Serve(srv.Serve) }()
			if runtime.GOOS != "js" && runtime.GOOS != "wasip1" { // their net/http uses another client
				client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
				for range 20 {
					resp, err := client.Get("http://" + s.Addr().String())
					require.NoError(t, err)
					require.NoError(t, resp.Body.Close())
					require.Equal(t, http.StatusOK, resp.StatusCode)
				}
			}
			require.NoError(t, end(srv))
			require.True(t, <-served == http.ErrServerClosed)
			requireAllClosed(t, s)
		})
	}
}

func requireAllClosed(t *testing.T, s *Shards) {
	t.Helper()
	for l := range s.All() {
		_, err := l.Accept()
		require.ErrorIs(t, err, net.ErrClosed)
	}
}

// DrainAll drains listeners that something else keeps apart.
func TestDrainAll(t *testing.T) {
	require.ErrorIs(t, DrainAll(t.Context()), sys.ErrNotListening)
	s, err := ListenTCPShards("127.0.0.1:0", 1)
	require.NoError(t, err)
	defer s.Close()
	go s.Serve(func(ln net.Listener) error { return http.Serve(ln, nil) })
	var each []*Listener
	for l := range s.All() {
		each = append(each, l)
	}
	if err := DrainAll(t.Context(), each...); !errors.Is(err, ErrStillOpen) && !errors.Is(err, errors.ErrUnsupported) {
		require.NoError(t, err)
	}
}
