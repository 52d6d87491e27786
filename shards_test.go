package acceptq

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// spreads says whether this system spreads connections over shards, by its name
// or by what its kernel does, and not by the library.
func spreads() bool {
	return slices.Contains([]string{"linux", "android"}, runtime.GOOS) || kernelSpreads()
}

// shardClients is how many clients may wait in four shards so that each has some and the
// length of each queue is known.
func shardClients() int {
	if runtime.GOOS == "dragonfly" {
		return 60 // of which a queue tells no more than 31
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
	s, err := ListenTCPShards("127.0.0.1:0", 1, nil)
	require.Nil(t, s)
	require.Error(t, err, "a nil option")
	s, err = ListenShards(t.Context(), "udp", "127.0.0.1:0", 2)
	require.Nil(t, s)
	require.Error(t, err, "no TCP")
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
	go func() { served <- s.Serve(echo) }()
	c, err := net.Dial("tcp", s.Addr().String())
	require.NoError(t, err)
	require.NoError(t, askEcho(c))
	require.NoError(t, c.Close())
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-served, net.ErrClosed)
	requireAllClosed(t, s)
	require.Equal(t, only[0].EffectiveBacklog(), s.EffectiveBacklog(), "works after Close")
}

// Several shards share one address and each gets clients; where the system gives
// them all to one, there are no shards.
func TestShardsEachGetClients(t *testing.T) {
	const n = 4
	clients := shardClients()
	s, err := ListenTCPShards("127.0.0.1:0", n)
	if !spreads() {
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

	for _, c := range connectAll(t, s.Addr(), clients) {
		defer c.Close()
	}
	queuedBecomes(t, clients, s.Stats)
	for l := range s.All() {
		q, err := l.Stats()
		require.NoError(t, err)
		require.Positive(t, q.Queued, "a shard got none of %d clients", clients)
	}
}

// apart are shards of one address each: what is one thing for all of them can so
// be tried where the system has no others.
func apart(t *testing.T, n int, opts ...Option) *Shards {
	t.Helper()
	s := new(Shards)
	t.Cleanup(func() { s.Close() })
	for range n {
		l, err := ListenTCP("127.0.0.1:0", opts...)
		require.NoError(t, err)
		s.listeners = append(s.listeners, l)
	}
	return s
}

func TestShardsOrder(t *testing.T) {
	s := apart(t, 3)
	require.Equal(t, s.listeners, slices.Collect(s.All()))
	for l := range s.All() {
		require.Same(t, s.listeners[0], l)
		break // All stops when the loop does
	}
}

func TestSumWithAnUnknownPart(t *testing.T) {
	const known = 5
	itself := func(n int64) int64 { return n }
	require.EqualValues(t, unknown, sumOf(nil, itself), "of none")
	require.EqualValues(t, 0, sumOf([]int64{0, 0}, itself))
	require.EqualValues(t, known+2, sumOf([]int64{known, 2}, itself))
	require.EqualValues(t, unknown, sumOf([]int64{known, unknown, 2}, itself))
	require.EqualValues(t, unknown, sumOf([]int64{unknown, unknown}, itself), "and not their sum")

	s := apart(t, 2, WithBacklog(known))
	s.listeners[1].granted.Store(&Backlog{Requested: known, Limit: unknown, Effective: unknown, Capacity: unknown})
	require.Equal(t, unknown, s.EffectiveBacklog())
}

func TestZeroShards(t *testing.T) {
	s := new(Shards)
	require.Zero(t, s.Len())
	require.Empty(t, slices.Collect(s.All()))
	require.Nil(t, s.Addr())
	require.Equal(t, unknown, s.EffectiveBacklog())
	stats, err := s.Stats()
	require.Equal(t, noStats, stats)
	require.ErrorIs(t, err, errNotListening)
	require.ErrorIs(t, s.SetBacklog(1), errNotListening)
	require.ErrorIs(t, s.Drain(t.Context()), errNotListening)
	require.ErrorIs(t, s.Close(), errNotListening)
	require.ErrorIs(t, s.Serve(func(net.Listener) error { panic("there is none to serve") }), errNotListening)
}

// Serve returns what serve returned first, itself, and not before all have
// returned. The others are ended by a close.
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
			if ln == s.listeners[1] {
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

// The server's own word for a shutdown comes back as it is, so that the usual
// comparison holds.
func TestServeHTTP(t *testing.T) {
	n := 3
	if !spreads() {
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
			if runtime.GOOS != "js" && runtime.GOOS != "wasip1" { // their http has a client of its own
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

// echo serves ln: each connection gets its first byte back.
func echo(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			p := make([]byte, 1) // io.Copy would splice, and keep a pipe for the next time
			if n, _ := c.Read(p); n == 1 {
				c.Write(p)
			}
		}()
	}
}

// askEcho sends a byte and waits for it, and for the server's close.
func askEcho(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{'x'}); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err == nil && string(answer) != "x" {
		err = errors.New("another answer than what was sent")
	}
	return err
}

// connectAll connects clients, several at a time, all of which must get in. The
// test closes them when it ends.
func connectAll(t *testing.T, addr net.Addr, clients int) []net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conns, errs := make([]net.Conn, clients), make([]error, clients)
	each(clients, func(i int) {
		conns[i], errs[i] = new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
	})
	t.Cleanup(func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	})
	require.NoError(t, errors.Join(errs...))
	return conns
}

// each calls f with 0 to n-1, at most 50 at a time.
func each(n int, f func(i int)) {
	var wait sync.WaitGroup
	room := make(chan struct{}, 50)
	for i := range n {
		room <- struct{}{}
		wait.Go(func() {
			f(i)
			<-room
		})
	}
	wait.Wait()
}
