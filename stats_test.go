package acceptq

import (
	"bytes"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"math"
	"net"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/testkit"
)

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
			require.Equal(t, unknownStats, s, name)
		}
		return
	}
	for name, read := range readers {
		require.Zero(t, queuedBecomes(t, 0, read).Queued, name)
	}
	clients := []net.Conn{testkit.Connect(t, "tcp", ln.Addr().String()), testkit.Connect(t, "tcp", ln.Addr().String())}
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

	testkit.AcceptAndExchange(t, ln, clients)
	queuedBecomes(t, 1, ln.Stats)
	testkit.AcceptAndExchange(t, ln, clients)
	for _, read := range readers {
		queuedBecomes(t, 0, read)
	}
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
		"a full shard of eight":        {Stats{Queued: 16, Capacity: 128, Fullest: &Stats{Queued: 16, Capacity: 16}}, 1, true},
		"queued unknown":               {Stats{Queued: unknown, Capacity: 129}, 0, false},
		"capacity unknown":             {Stats{Queued: 3, Capacity: unknown}, 0, false},
		"all unknown":                  {unknownStats, 0, false},
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
			unknownStats,
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
		require.Nil(t, got["queued"], "an unknown number is null, never 0")
	}
}

// Reading the queue is cheap: it hardly allocates.
func TestAllocations(t *testing.T) {
	if testkit.RaceDetector {
		t.Skip("the race detector drops objects of sync.Pool at random: run it without -race")
	}
	ln := listenForStats(t, WithBacklog(5))
	require.Zero(t, testing.AllocsPerRun(200, func() { ln.EffectiveBacklog() }), "EffectiveBacklog")
	if !systemTells() {
		t.Skip("the rest needs a system that reports its queue: Linux, a BSD or macOS")
	}
	require.Zero(t, testing.AllocsPerRun(200, func() { ln.Stats() }), "Stats")
	adopted := mustWrap(t, ln.TCPListener())
	require.Zero(t, testing.AllocsPerRun(200, func() { adopted.Stats() }), "Stats after Wrap")
	most := 1.0 // the RawConn that net allocates for each caller
	if runtime.GOOS != "linux" && runtime.GOOS != "android" {
		most = 2 // and the address that shows that it is a TCP socket
	}
	if runtime.GOOS == "dragonfly" {
		most = 3 // and the check for a peer
	}
	require.LessOrEqual(t, testing.AllocsPerRun(200, func() { ReadStats(ln.TCPListener()) }), most, "ReadStats")
}

// ReadStats reads a type that embeds a Listener like a Listener, without marking its socket
// as shared.
func TestReadStatsOfAnEmbeddedListener(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	ReadStats(struct{ *Listener }{ln})
	ReadStats(ln)
	require.False(t, ln.intake.Shown.Load())
	ln.TCPListener()
	require.True(t, ln.intake.Shown.Load())
}

// A sum hides a full shard, so it names the fullest one.
func TestFullest(t *testing.T) {
	full, idle := Stats{Queued: 16, Limit: 15, Capacity: 16, Drops: 3}, Stats{Limit: 15, Capacity: 16}
	require.Equal(t, &full, fullest([]Stats{idle, full, idle}))
	require.Equal(t, &idle, fullest([]Stats{idle, idle}))
	require.Nil(t, fullest([]Stats{full}), "a single queue")
	require.Nil(t, fullest([]Stats{full, {Queued: unknown, Capacity: 16}}), "an unknown shard may be fuller")
	sum := Stats{Queued: 16, Incomplete: unknown, Limit: 120, Capacity: 128, Drops: 3, Fullest: &full}
	require.Equal(t, "16 queued of 128, fullest shard 16 of 16 (100%), limit 120, drops 3", sum.String())
	text, err := json.Marshal(sum)
	require.NoError(t, err)
	require.JSONEq(t, `{"queued":16,"incomplete":null,"limit":120,"capacity":128,"drops":3,
		"fullest":{"queued":16,"incomplete":0,"limit":15,"capacity":16,"drops":3}}`, string(text))
	var back Stats
	require.NoError(t, json.Unmarshal(text, &back))
	require.Equal(t, sum, back)
	require.Contains(t, fmt.Sprint(sum.LogValue()), "fullest=")
}
