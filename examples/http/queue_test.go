package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

// tells reports whether this system reports how long a connection waited.
func tells(t *testing.T) bool {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	s, err := ln.Accept()
	require.NoError(t, err)
	defer s.Close()
	_, err = acceptq.QueueTime(s)
	return err == nil
}

// answerOf requests url over a new connection.
func answerOf(t *testing.T, url string) (*http.Response, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	resp, err := client.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, string(body)
}

// A client that waited for longer than the budget before Accept was called gets 503, and
// the handler does no work for it. The next client is served.
func TestShedding(t *testing.T) {
	if !tells(t) {
		t.Skip("this system does not report how long a connection waited")
	}
	const budget = 100 * time.Millisecond
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	var worked atomic.Int64
	var times queueTimes
	mux := http.NewServeMux()
	mux.Handle("/", times.shedding(budget, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		worked.Add(1)
		io.WriteString(w, "done")
	})))
	mux.HandleFunc("/debug/backlog", serveBacklog(ln, &times))
	srv := &http.Server{Handler: mux, ConnContext: times.connContext}

	// Two clients wait until the first has waited for longer than the budget.
	late := make(chan *http.Response, 2)
	for _, path := range []string{"/", "/debug/backlog?waiting"} {
		go func() {
			resp, err := http.Get("http://" + ln.Addr().String() + path)
			if err != nil {
				t.Error(err)
			}
			late <- resp
		}()
	}
	require.Eventually(t, func() bool {
		waiting, err := ln.Waiting(t.Context())
		return err == nil && len(waiting) == 2 && waiting[1].Waited > 2*budget
	}, 20*time.Second, time.Millisecond)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	statuses := map[string]int{}
	for range 2 {
		resp := <-late
		require.NotNil(t, resp)
		statuses[resp.Request.URL.Path] = resp.StatusCode
		if resp.StatusCode == http.StatusServiceUnavailable {
			require.Equal(t, "1", resp.Header.Get("Retry-After"))
			require.True(t, resp.Close)
		}
		resp.Body.Close()
	}
	require.Equal(t, map[string]int{"/": 503, "/debug/backlog": 200}, statuses, "/debug must answer under overload")
	require.Zero(t, worked.Load())

	// On a busy machine a client can be too late by chance, but rarely every time.
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, body := answerOf(t, "http://"+ln.Addr().String()+"/")
		if resp.StatusCode == http.StatusOK {
			require.Equal(t, "done", body)
			break
		}
		require.True(t, time.Now().Before(deadline), "%d", resp.StatusCode)
	}
	require.EqualValues(t, 1, worked.Load())

	_, body := answerOf(t, "http://"+ln.Addr().String()+"/debug/backlog?waiting")
	var debug struct {
		QueueTimes struct {
			Buckets []bucket
			Unknown int64
			Shed    int64
		}
		Error string
	}
	require.NoError(t, json.Unmarshal([]byte(body), &debug))
	require.Contains(t, body, `"waiting":[]`, "no client waits")
	require.GreaterOrEqual(t, debug.QueueTimes.Shed, int64(1))
	require.Zero(t, debug.QueueTimes.Unknown)
	require.Empty(t, debug.Error)
	var over int64
	for i, b := range debug.QueueTimes.Buckets {
		if i > 5 { // over 100 ms
			over += b.Connections
		}
	}
	require.GreaterOrEqual(t, over, int64(2))

	require.NoError(t, srv.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

// Every client is served if there is no budget, or if the time is unknown.
func TestSheddingNobody(t *testing.T) {
	for name, r := range map[string]*http.Request{
		"unknown": requestAfter(-1),
		"0":       requestAfter(time.Hour),
	} {
		var times queueTimes
		budget := time.Duration(0)
		if name == "unknown" {
			budget = time.Nanosecond
		}
		worked := false
		times.shedding(budget, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { worked = true })).ServeHTTP(nil, r)
		require.True(t, worked, name)
		require.Zero(t, times.shed.Load())
	}
}

// requestAfter returns a request of a connection that waited for d. A negative d means
// unknown.
func requestAfter(d time.Duration) *http.Request {
	r, _ := http.NewRequest("GET", "/", nil)
	if d < 0 {
		return r
	}
	return r.WithContext(context.WithValue(r.Context(), queueTimeKey{}, d))
}

// If Accept has not been called, the watchdog logs once, with the first client in the
// queue.
func TestWatchdog(t *testing.T) {
	var log bytes.Buffer
	former := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(former)

	head := func(waited time.Duration) func(context.Context) ([]acceptq.Waiting, error) {
		return func(context.Context) ([]acceptq.Waiting, error) {
			return []acceptq.Waiting{{Client: netip.MustParseAddrPort("192.0.2.1:99"), Waited: waited}}, nil
		}
	}
	fails := func(context.Context) ([]acceptq.Waiting, error) { return nil, errors.ErrUnsupported }
	var d watchdog
	for i, look := range []struct {
		accepted int64
		queued   int
		waiting  func(context.Context) ([]acceptq.Waiting, error)
		says     string // "" means that it logs nothing
	}{
		{5, 3, head(2 * time.Second), ""},  // five were accepted since the start
		{5, 0, head(2 * time.Second), ""},  // no client waits
		{5, -1, head(2 * time.Second), ""}, // unknown
		{5, 3, head(2 * time.Second), "first=\"192.0.2.1:99 for 2s"},
		{5, 3, head(3 * time.Second), ""},  // it has logged already
		{6, 3, head(3 * time.Second), ""},  // Accept is called again
		{6, 1, head(time.Millisecond), ""}, // the client has just connected
		{6, 1, head(time.Second + time.Millisecond), "for 1.001s"},
		{7, 0, head(0), ""},
		{7, 1, fails, "unsupported operation"},
	} {
		log.Reset()
		d.look(t.Context(), look.accepted, acceptq.Stats{Queued: look.queued, Capacity: 5}, look.waiting)
		if look.says == "" {
			require.Empty(t, log.String(), i)
			continue
		}
		require.Equal(t, 1, strings.Count(log.String(), "Accept has not been called for a second"), i)
		require.Contains(t, log.String(), look.says, i)
	}
}
