package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/overload"
	"github.com/stretchr/testify/require"
)

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

// /debug/backlog has the distribution of the waits and the clients that wait now.
func TestDebug(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	var times queueTimes
	for _, d := range []time.Duration{0, time.Millisecond, 30 * time.Millisecond, time.Minute} {
		times.Observe(d)
	}
	debug := httptest.NewServer(serveBacklog(ln, &times, overload.NewShedder(0)))
	defer debug.Close()
	_, body := answerOf(t, debug.URL+"?waiting")
	var answer struct {
		QueueTimes []bucket
		Shed       int64
		Error      string
	}
	require.NoError(t, json.Unmarshal([]byte(body), &answer))
	require.Len(t, answer.QueueTimes, len(bounds)+1)
	require.Equal(t, bucket{"1ms", 2}, answer.QueueTimes[0])
	require.Equal(t, bucket{"50ms", 1}, answer.QueueTimes[4])
	require.Equal(t, bucket{"more", 1}, answer.QueueTimes[len(bounds)])
	if answer.Error == "" {
		require.Contains(t, body, `"waiting":[]`, "no client waits")
	}
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
		accepted uint64
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
