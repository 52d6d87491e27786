package acceptq

import (
	"bytes"
	"encoding/json"
	"errors"
	"expvar"
	"io"
	"log/slog"
	"math"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// systemTells says whether this is a system whose accept queue can be read.
func systemTells() bool {
	_, known := ruleOf(runtime.GOOS)
	return known
}

// listenForStats listens on loopback until the test ends.
func listenForStats(t testing.TB, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// queuedBecomes waits until the listener says that n connections are queued. A
// client may know of the end of its handshake before the server does.
func queuedBecomes(t testing.TB, n int, stats func() (Stats, error)) Stats {
	t.Helper()
	var last Stats
	var err error
	require.Eventually(t, func() bool {
		last, err = stats()
		return err != nil || last.Queued == n
	}, 20*time.Second, time.Millisecond, "Queued never became %d", n)
	require.NoError(t, err)
	return last
}

// acceptAndExchange accepts one connection and sends a byte through it to
// whichever of the clients it belongs to, and back.
func acceptAndExchange(t testing.TB, ln net.Listener, clients []net.Conn) {
	t.Helper()
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	for _, c := range clients {
		if c.LocalAddr().String() != server.RemoteAddr().String() {
			continue
		}
		deadline := time.Now().Add(20 * time.Second)
		require.NoError(t, c.SetDeadline(deadline))
		require.NoError(t, server.SetDeadline(deadline))
		for _, way := range [][2]net.Conn{{c, server}, {server, c}} {
			_, err := way[0].Write([]byte{'x'})
			require.NoError(t, err)
			var b [1]byte
			_, err = io.ReadFull(way[1], b[:])
			require.NoError(t, err)
			require.Equal(t, byte('x'), b[0])
		}
		return
	}
	t.Fatalf("%v was accepted and is none of the clients", server.RemoteAddr())
}

func TestStatsAgreeWithTheQueue(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	readers := map[string]func() (Stats, error){
		"Listener.Stats":                ln.Stats,
		"ReadStats of a Listener":       func() (Stats, error) { return ReadStats(ln) },
		"ReadStats of a *TCPListener":   func() (Stats, error) { return ReadStats(ln.TCPListener()) },
		"Listener.Stats, adopted again": mustWrap(t, ln.TCPListener()).Stats,
	}
	if !systemTells() {
		for name, read := range readers {
			s, err := read()
			require.ErrorIs(t, err, errors.ErrUnsupported, name)
			require.Equal(t, noStats, s, name)
		}
		return
	}
	for name, read := range readers {
		require.Zero(t, queuedBecomes(t, 0, read).Queued, name)
	}
	clients := []net.Conn{connect(t, "tcp", ln.Addr().String()), connect(t, "tcp", ln.Addr().String())}
	for _, read := range readers {
		queuedBecomes(t, 2, read)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	b := ln.Backlog()
	require.Equal(t, b.Limit, s.Limit)
	require.Equal(t, b.Capacity, s.Capacity)
	part, known := s.Utilization()
	require.True(t, known)
	require.InDelta(t, 2/float64(b.Capacity), part, 1e-9)

	acceptAndExchange(t, ln, clients)
	queuedBecomes(t, 1, ln.Stats)
	acceptAndExchange(t, ln, clients)
	for _, read := range readers {
		queuedBecomes(t, 0, read)
	}
}

func mustWrap(t testing.TB, ln net.Listener) *Listener {
	t.Helper()
	w, err := Wrap(ln)
	require.NoError(t, err)
	return w
}

func TestSetBacklogKeepsTheAccount(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	before := ln.Backlog()
	b, err := ln.SetBacklog(7)
	if !systemTells() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, before, b)
		require.Equal(t, before, ln.Backlog())
		return
	}
	require.NoError(t, err)
	require.Equal(t, 7, b.Requested)
	require.Equal(t, b, ln.Backlog())
	require.Equal(t, b.Effective, ln.EffectiveBacklog())
	want, err := PredictBacklog(7)
	require.NoError(t, err)
	require.Equal(t, want.Limit, b.Limit)

	b, err = ln.SetBacklog(math.MinInt)
	require.NoError(t, err)
	require.Equal(t, -1, b.Requested, "as much as the system allows")
	require.Equal(t, b.Ceiling, b.Limit)
}

// Listening again is granted what listening is, and loses nobody who waits.
func TestListeningAgainKeepsWhatWaits(t *testing.T) {
	if !systemTells() {
		t.Skip("this system has no second listen, see TestSetBacklogKeepsTheAccount")
	}
	ln := listenForStats(t, WithBacklog(50))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	for _, n := range []int{5, 50, 0, -1, 10, 2} {
		want, err := PredictBacklog(n)
		require.NoError(t, err)
		b, err := ln.SetBacklog(n)
		require.NoError(t, err)
		want.Measured = b.Measured
		require.Equal(t, want, b)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, b.Limit, s.Limit)
		require.Equal(t, b.Capacity, s.Capacity)
		require.Equal(t, 16, s.Queued, "after SetBacklog(%d)", n)
	}
	for range clients {
		acceptAndExchange(t, ln, clients)
	}
	queuedBecomes(t, 0, ln.Stats)
}

// Wrap gives a second view of one socket, and the first goes on working.
func TestWrapLeavesTheOriginalWorking(t *testing.T) {
	original, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { original.Close() })
	before := openDescriptors()
	ln := mustWrap(t, original)
	require.Equal(t, before, openDescriptors(), "no descriptor is copied")
	require.Same(t, original, ln.TCPListener())
	require.Equal(t, -1, ln.Backlog().Requested, "what the first holder asked for is not known")

	for _, side := range []net.Listener{original, ln, original, ln} {
		acceptAndExchange(t, side, []net.Conn{connect(t, "tcp", original.Addr().String())})
	}
	if systemTells() {
		_, err := ln.SetBacklog(3)
		require.NoError(t, err)
		acceptAndExchange(t, original, []net.Conn{connect(t, "tcp", original.Addr().String())})
	}

	require.NoError(t, ln.Close())
	_, err = original.Accept()
	require.ErrorIs(t, err, net.ErrClosed, "both have one socket")
}

func TestWrapReturnsAListenerAsItIs(t *testing.T) {
	ln := listenForStats(t, WithBacklog(3))
	again := mustWrap(t, ln)
	require.Same(t, ln, again)
	require.Equal(t, 3, again.Backlog().Requested)
}

func TestClosedListener(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	account := ln.Backlog()
	require.NoError(t, ln.Close())

	s, err := ln.Stats()
	requireClosed(t, err)
	require.Equal(t, noStats, s)
	requireOp(t, err, "stats")
	s, err = ReadStats(ln)
	requireClosed(t, err)
	require.Equal(t, noStats, s)
	requireOp(t, err, "stats")
	b, err := ln.SetBacklog(9)
	requireClosed(t, err)
	require.Equal(t, account, b)
	requireOp(t, err, "listen")
	if systemTells() {
		w, err := Wrap(ln.TCPListener())
		require.ErrorIs(t, err, net.ErrClosed)
		require.Nil(t, w)
		requireOp(t, err, "wrap")
	}

	require.Equal(t, account, ln.Backlog(), "it works after Close")
	require.Equal(t, account.Effective, ln.EffectiveBacklog())
}

// requireClosed looks for the error of a closed socket. Where nothing can be told
// of any socket, that may be said instead: net under js does not know which are
// closed.
func requireClosed(t *testing.T, err error) {
	t.Helper()
	if !systemTells() && errors.Is(err, errors.ErrUnsupported) {
		return
	}
	require.ErrorIs(t, err, net.ErrClosed)
}

// requireOp looks for one *net.OpError, of ours, over the cause.
func requireOp(t *testing.T, err error, name string) {
	t.Helper()
	var op, inner *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, name, op.Op)
	require.False(t, errors.As(op.Err, &inner), "an OpError in an OpError: %v", err)
}

// An error names the address, so that a log of several listeners can be read.
func TestErrorsNameTheAddress(t *testing.T) {
	ln := listenForStats(t)
	require.NoError(t, ln.Close())
	_, statsErr := ln.Stats()
	_, resizeErr := ln.SetBacklog(1)
	for _, err := range []error{statsErr, resizeErr} {
		var op *net.OpError
		require.ErrorAs(t, err, &op)
		require.Equal(t, ln.Addr(), op.Addr, "%v", err)
		require.Equal(t, "tcp", op.Net)
	}
}

func TestZeroListener(t *testing.T) {
	var ln Listener
	s, err := ln.Stats()
	require.ErrorIs(t, err, syscall.EINVAL)
	require.Equal(t, noStats, s)
	_, err = ReadStats(&ln)
	require.ErrorIs(t, err, syscall.EINVAL)
	_, err = Wrap(&ln)
	require.ErrorIs(t, err, syscall.EINVAL)
	b, err := ln.SetBacklog(9)
	require.ErrorIs(t, err, syscall.EINVAL)
	nothing := Backlog{Requested: -1, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}
	require.Equal(t, nothing, b)
	require.Equal(t, nothing, ln.Backlog())
	require.Equal(t, unknown, ln.EffectiveBacklog())
}

// What is no listening TCP socket is refused by both doors.
func TestNoListeningSocket(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	ln := listenForStats(t)
	client := connect(t, "tcp", ln.Addr().String())
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()

	conns := map[string]syscall.Conn{
		"nothing":               nil,
		"a nil *TCPListener":    (*net.TCPListener)(nil),
		"a zero TCPListener":    new(net.TCPListener),
		"a UDP socket":          udp.(syscall.Conn),
		"the client's TCP end":  client.(syscall.Conn),
		"the server's TCP end":  server.(syscall.Conn),
		"a closed UDP socket":   closedUDP(t),
		"a zero UDP connection": new(net.UDPConn),
	}
	listeners := map[string]net.Listener{
		"nothing":             nil,
		"a nil *Listener":     (*Listener)(nil),
		"a nil *TCPListener":  (*net.TCPListener)(nil),
		"a zero TCPListener":  new(net.TCPListener),
		"one of another type": struct{ net.Listener }{ln},
	}
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Logf("without unix sockets, which this system does not make: %v", err)
	} else {
		defer unix.Close()
		conns["a unix listener"] = unix.(syscall.Conn)
		listeners["a unix listener"] = unix
	}
	if systemTells() {
		// net takes any stream socket for a listener.
		file, err := client.(*net.TCPConn).File()
		require.NoError(t, err)
		connected, err := net.FileListener(file)
		require.NoError(t, err)
		require.NoError(t, file.Close())
		defer connected.Close()
		listeners["a connected TCP socket"] = connected
	}

	before := openDescriptors()
	for name, c := range conns {
		t.Run("ReadStats of "+name, func(t *testing.T) {
			s, err := ReadStats(c)
			require.Equal(t, noStats, s)
			requireOp(t, err, "stats")
			switch {
			case name == "a closed UDP socket":
				requireClosed(t, err)
			case systemTells():
				require.ErrorIs(t, err, syscall.EINVAL)
			default:
				require.True(t, errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported), "%v", err)
			}
		})
	}
	for name, l := range listeners {
		t.Run("Wrap of "+name, func(t *testing.T) {
			w, err := Wrap(l)
			require.Nil(t, w)
			requireOp(t, err, "wrap")
			require.ErrorIs(t, err, syscall.EINVAL)
			// There may be one that can be wrapped inside it.
			require.Equal(t, name == "one of another type", strings.Contains(err.Error(), "inside it"), "%v", err)
		})
	}
	require.Equal(t, before, openDescriptors())
}

func closedUDP(t *testing.T) syscall.Conn {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, c.Close())
	return c.(syscall.Conn)
}

func TestUtilization(t *testing.T) {
	for name, row := range map[string]struct {
		s     Stats
		part  float64
		known bool
	}{
		"empty":                        {Stats{Queued: 0, Capacity: 129}, 0, true},
		"half":                         {Stats{Queued: 64, Capacity: 128}, 0.5, true},
		"full":                         {Stats{Queued: 129, Capacity: 129}, 1, true},
		"over, by a race":              {Stats{Queued: 6, Capacity: 5}, 1.2, true},
		"of one connection":            {Stats{Queued: 1, Capacity: 1}, 1, true},
		"the largest of both":          {Stats{Queued: math.MaxInt, Capacity: math.MaxInt}, 1, true},
		"queued unknown":               {Stats{Queued: unknown, Capacity: 129}, 0, false},
		"capacity unknown":             {Stats{Queued: 3, Capacity: unknown}, 0, false},
		"all unknown":                  {noStats, 0, false},
		"nothing read":                 {Stats{}, 0, false},
		"limit and drops play no part": {Stats{Queued: 1, Capacity: 4, Limit: unknown, Drops: unknown}, 0.25, true},
	} {
		part, known := row.s.Utilization()
		require.Equal(t, row.known, known, name)
		require.Equal(t, row.part, part, name)
	}
}

func TestStatsInWords(t *testing.T) {
	for _, row := range []struct {
		s                 Stats
		line, json, group string
	}{
		{
			Stats{Queued: 97, Incomplete: unknown, Limit: 128, Capacity: 129, Drops: 12},
			"97 queued of 129 (75%), limit 128, drops 12",
			`{"queued":97,"incomplete":null,"limit":128,"capacity":129,"drops":12}`,
			"queue.queued=97 queue.limit=128 queue.capacity=129 queue.drops=12",
		},
		{
			Stats{Queued: 0, Incomplete: 6, Limit: 5, Capacity: 8, Drops: unknown},
			"0 queued of 8 (0%), limit 5, drops unknown, 6 held back",
			`{"queued":0,"incomplete":6,"limit":5,"capacity":8,"drops":null}`,
			"queue.queued=0 queue.incomplete=6 queue.limit=5 queue.capacity=8",
		},
		{
			noStats,
			"nothing known",
			`{"queued":null,"incomplete":null,"limit":null,"capacity":null,"drops":null}`,
			"",
		},
		{
			Stats{Queued: unknown, Incomplete: 0, Limit: 0, Capacity: 1, Drops: 0},
			"unknown queued of 1, limit 0, drops 0, 0 held back",
			`{"queued":null,"incomplete":0,"limit":0,"capacity":1,"drops":0}`,
			"queue.incomplete=0 queue.limit=0 queue.capacity=1 queue.drops=0",
		},
		{
			Stats{Queued: math.MaxInt32, Incomplete: 0, Limit: math.MaxInt32, Capacity: math.MaxInt32, Drops: math.MaxUint32},
			"2147483647 queued of 2147483647 (100%), limit 2147483647, drops 4294967295, 0 held back",
			`{"queued":2147483647,"incomplete":0,"limit":2147483647,"capacity":2147483647,"drops":4294967295}`,
			"queue.queued=2147483647 queue.incomplete=0 queue.limit=2147483647 queue.capacity=2147483647 queue.drops=4294967295",
		},
	} {
		require.Equal(t, row.line, row.s.String())
		text, err := json.Marshal(row.s)
		require.NoError(t, err)
		require.Equal(t, row.json, string(text))
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("", "queue", row.s)
		require.Contains(t, log.String(), row.group+"\n")
	}
}

func TestStatsInExpvar(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	v := expvar.Func(func() any { s, _ := ln.Stats(); return s })
	var got map[string]*int64
	require.NoError(t, json.Unmarshal([]byte(v.String()), &got))
	require.Len(t, got, 5)
	if systemTells() {
		require.NotNil(t, got["queued"])
		require.Zero(t, *got["queued"])
	} else {
		require.Nil(t, got["queued"], "what is not told is null, never 0")
	}
}

func TestSystemAnswers(t *testing.T) {
	s, err := ReadSystem()
	if !systemTells() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, System{
			Ceiling: unknown, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
			ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
		}, s)
	} else {
		require.NoError(t, err)
		predicted, err := PredictBacklog(-1)
		if err == nil {
			require.Equal(t, predicted.Ceiling, s.Ceiling)
		}
	}
	some := System{Ceiling: 128, Knob: "k", SYNBacklog: unknown, ListenDrops: unknown}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "system", some)
	require.Contains(t, log.String(), "system.ceiling=128 system.knob=k system.synCookies=0 system.abortOnOverflow=0 "+
		"system.migrateRequests=0 system.listenOverflows=0 system.reqQFullDrop=0 system.reqQFullDoCookies=0\n")
	text, err := json.Marshal(some)
	require.NoError(t, err)
	require.Equal(t, `{"ceiling":128,"knob":"k","synBacklog":null,"synCookies":0,"abortOnOverflow":0,`+
		`"migrateRequests":0,"listenOverflows":0,"listenDrops":null,"reqQFullDrop":0,"reqQFullDoCookies":0}`, string(text))
}

// Eight goroutines call everything at once; half-way one of them closes.
func TestEverythingAtOnce(t *testing.T) {
	const rounds = 60
	ln := listenForStats(t, WithBacklog(64))
	clients := make([]net.Conn, 0, rounds)

	var working, half sync.WaitGroup
	// start calls f in a goroutine of its own. Until Close f must succeed, where
	// the system can do it at all.
	start := func(name string, f func(i int) error) {
		half.Add(1)
		working.Go(func() {
			for i := range rounds {
				if i == rounds/2 {
					half.Done()
				}
				err := f(i)
				if err == nil || !systemTells() && errors.Is(err, errors.ErrUnsupported) {
					continue
				}
				assert.GreaterOrEqual(t, i, rounds/2, "%s before Close: %v", name, err)
				assert.ErrorIs(t, err, net.ErrClosed, name)
			}
		})
	}
	start("Stats", func(int) error { _, err := ln.Stats(); return err })
	start("ReadStats", func(int) error { _, err := ReadStats(ln); return err })
	start("SetBacklog", func(i int) error { _, err := ln.SetBacklog([]int{64, -1, 128, 65}[i%4]); return err })
	start("Backlog", func(int) error { assert.GreaterOrEqual(t, ln.Backlog().Requested, -1); return nil })
	start("EffectiveBacklog", func(int) error { assert.NotZero(t, ln.EffectiveBacklog()); return nil })
	start("Addr", func(int) error { assert.NotNil(t, ln.Addr()); return nil })
	start("Wrap", func(int) error { _, err := Wrap(ln.TCPListener()); return err })
	start("dial", func(i int) error {
		if i > rounds/2 {
			return nil
		}
		c, err := net.Dial("tcp", ln.Addr().String())
		if i == rounds/2 {
			if err == nil { // from here on Close may have been first
				c.Close()
			}
			return nil
		}
		clients = append(clients, c)
		return err
	})
	working.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				assert.ErrorIs(t, err, net.ErrClosed)
				return
			}
			c.Close()
		}
	})
	working.Go(func() {
		half.Wait()
		assert.NoError(t, ln.Close())
	})
	working.Wait()
	require.Len(t, clients, rounds/2)
	for _, c := range clients {
		c.Close()
	}
}

// A monitor may look at the queue as often as it likes.
func TestAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector makes sync.Pool forget at random: run it without -race")
	}
	ln := listenForStats(t, WithBacklog(5))
	require.Zero(t, testing.AllocsPerRun(200, func() { ln.EffectiveBacklog() }), "EffectiveBacklog")
	if !systemTells() {
		t.Skip("the rest needs a system that tells its queue, as Linux, the BSDs and macOS do")
	}
	require.Zero(t, testing.AllocsPerRun(200, func() { ln.Stats() }), "Stats")
	adopted := mustWrap(t, ln.TCPListener())
	require.Zero(t, testing.AllocsPerRun(200, func() { adopted.Stats() }), "Stats after Wrap")
	most := 1.0 // the RawConn that net makes for each caller
	if runtime.GOOS != "linux" && runtime.GOOS != "android" {
		most = 2 // and the address by which a TCP socket is told from others
	}
	if runtime.GOOS == "dragonfly" {
		most = 3 // and the question whether there is a peer
	}
	require.LessOrEqual(t, testing.AllocsPerRun(200, func() { ReadStats(ln.TCPListener()) }), most, "ReadStats")
}

// A type that embeds a Listener is read as one: the descriptor is not shown.
func TestReadStatsOfAnEmbeddedListener(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	ReadStats(struct{ *Listener }{ln})
	ReadStats(ln)
	require.False(t, ln.intake.shown.Load())
	ln.TCPListener()
	require.True(t, ln.intake.shown.Load())
}
