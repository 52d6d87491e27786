package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	try.Be(main)
	os.Exit(m.Run())
}

// start runs the program and returns the address from its first line.
func start(t *testing.T, args ...string) (cmd *exec.Cmd, addr, backlog, admin string) {
	t.Helper()
	cmd = try.Program(t, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	lines := bufio.NewScanner(out)
	require.True(t, lines.Scan())
	addr, ok := strings.CutPrefix(lines.Text(), "listening on ")
	require.True(t, ok, lines.Text())
	require.True(t, lines.Scan())
	backlog = lines.Text()
	require.True(t, lines.Scan())
	admin, ok = strings.CutPrefix(lines.Text(), "health and debug on ")
	require.True(t, ok, lines.Text())
	return cmd, addr, backlog, admin
}

func get(t *testing.T, url string, to any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	require.NoError(t, err)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.True(t, strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json"))
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(body, to), "%s", body)
}

func TestProgram(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) { testProgram(t, "127.0.0.1:0") })
	t.Run("IPv6", func(t *testing.T) {
		if !try.HasIPv6() {
			t.Skip("no IPv6 on this host")
		}
		testProgram(t, "[::1]:0")
	})
}

func testProgram(t *testing.T, listenOn string) {
	cmd, addr, said, admin := start(t, "-addr", listenOn, "-admin", listenOn, "-backlog", "7")
	resp, body := answerOf(t, "http://"+addr)
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.Equal(t, "hello\n", body)
	resp, body = answerOf(t, "http://"+admin+"/healthz")
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.Equal(t, "ok\n", body)

	var debug struct {
		Backlog struct {
			Requested int
			Limit     *int
			Measured  bool
		}
		QueueTimes []bucket
	}
	get(t, "http://"+admin+"/debug/backlog", &debug)
	account := debug.Backlog
	counted := int64(0)
	for _, b := range debug.QueueTimes {
		counted += b.Connections
	}
	if runtime.GOOS == "linux" {
		require.EqualValues(t, 1, counted, "the connection of the first request")
	}
	require.Equal(t, 7, account.Requested)
	if account.Measured {
		require.Equal(t, 7, *account.Limit)
	}
	require.True(t, strings.HasPrefix(said, "backlog: asked 7"), said)

	var vars struct {
		AcceptQueues struct {
			HTTP struct {
				Stats    map[string]*int64
				Accepted int64
			}
		}
	}
	get(t, "http://"+admin+"/debug/vars", &vars)
	queue := vars.AcceptQueues.HTTP
	require.EqualValues(t, 1, queue.Accepted)
	if account.Measured {
		require.EqualValues(t, 7, *queue.Stats["limit"])
		require.Zero(t, *queue.Stats["queued"])
	}

	kept, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer kept.Close()
	answers := bufio.NewReader(kept)
	ask := func() *http.Response {
		_, err := io.WriteString(kept, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
		require.NoError(t, err)
		resp, err := http.ReadResponse(answers, nil)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		return resp
	}
	require.False(t, ask().Close)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		require.NoError(t, cmd.Process.Kill())
		cmd.Wait()
		t.Skipf("this system sends no SIGINT: %v", err)
	}
	for !ask().Close { // the kept connection is told to leave
	}
	require.NoError(t, cmd.Wait(), "exit status 0")
}

func TestOneWarningAMinute(t *testing.T) {
	var log bytes.Buffer
	former := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(former)

	full, low := acceptq.Stats{Queued: 9, Capacity: 10}, acceptq.Stats{Queued: 8, Capacity: 10}
	unknown := acceptq.Stats{Queued: -1, Capacity: 10}
	var w watch
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, look := range []struct {
		after time.Duration
		s     acceptq.Stats
		warns bool
	}{
		{0, low, false},
		{1 * time.Second, unknown, false},
		{2 * time.Second, full, true},
		{3 * time.Second, full, false},
		{10 * time.Second, low, false},
		{61 * time.Second, full, false},
		{62 * time.Second, full, true},
		{63 * time.Second, full, false},
	} {
		log.Reset()
		w.look(start.Add(look.after), look.s)
		require.Equal(t, look.warns, log.Len() > 0, "after %v: %s", look.after, &log)
		if look.warns {
			require.Contains(t, log.String(), "level=WARN")
			require.Contains(t, log.String(), "queue.queued=9")
		}
	}
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "http", `":8080"`, ":8080")
	try.BadAddresses(t, "http")
	try.ClosedPipe(t, "http", "-addr", "127.0.0.1:0", "-admin", "127.0.0.1:0")
}
