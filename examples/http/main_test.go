package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
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
func start(t *testing.T, args ...string) (cmd *exec.Cmd, addr, backlog string) {
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
	backlog, ok = strings.CutPrefix(lines.Text(), "backlog: ")
	require.True(t, ok, lines.Text())
	return cmd, addr, backlog
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
	cmd, addr, said := start(t, "-addr", listenOn, "-backlog", "7")

	var debug struct {
		Backlog struct {
			Requested int
			Limit     *int
			Measured  bool
		}
		QueueTimes struct {
			Buckets []bucket
			Unknown int64
		}
	}
	get(t, "http://"+addr+"/debug/backlog", &debug)
	account := debug.Backlog
	counted := debug.QueueTimes.Unknown
	for _, b := range debug.QueueTimes.Buckets {
		counted += b.Connections
	}
	require.EqualValues(t, 1, counted, "the connection of this request")
	require.Equal(t, 7, account.Requested)
	if account.Measured {
		require.Equal(t, 7, *account.Limit)
	}
	require.True(t, strings.HasPrefix(said, "asked 7"), said)

	var vars struct {
		AcceptQueue map[string]*int64
	}
	get(t, "http://"+addr+"/debug/vars", &vars)
	require.Len(t, vars.AcceptQueue, 5)
	if account.Measured {
		require.EqualValues(t, 7, *vars.AcceptQueue["limit"])
		require.Zero(t, *vars.AcceptQueue["queued"])
	}

	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		require.NoError(t, cmd.Process.Kill())
		cmd.Wait()
		t.Skipf("this system sends no SIGINT: %v", err)
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
	try.ClosedPipe(t, "http", "-addr", "127.0.0.1:0")
}

// A drain that uses all of its time does not shorten the time of Shutdown, so the
// current request is still answered.
func TestStepsHaveTheirOwnTime(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	if err := ln.Drain(t.Context()); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no Drain on this system:", err)
	}
	ln.Close()
	ln, err = acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)

	const each = 500 * time.Millisecond
	asked, answer := make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-answer
		io.WriteString(w, "answered")
	})}
	// The handler answers after Shutdown has checked for current requests.
	srv.RegisterOnShutdown(func() { time.AfterFunc(each/10, func() { close(answer) }) })
	door := &onlyOne{Listener: ln, end: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(door) }()
	got := make(chan error, 1)
	go func() {
		resp, err := http.Get("http://" + ln.Addr().String())
		if err == nil {
			defer resp.Body.Close()
			_, err = io.ReadAll(resp.Body)
		}
		got <- err
	}()
	<-asked
	// The second client stays in the queue: the server accepts no more.
	second, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer second.Close()

	former := slog.Default()
	var warning bytes.Buffer
	slog.SetDefault(slog.New(slog.NewTextHandler(&warning, nil)))
	defer slog.SetDefault(former)
	require.NoError(t, stop(ln, srv, each))
	require.Contains(t, warning.String(), "some clients may be reset", "the drain did not wait for the queued client")
	require.NoError(t, <-got)
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

// onlyOne accepts one connection.
type onlyOne struct {
	net.Listener
	full bool
	end  chan struct{}
	once sync.Once
}

func (l *onlyOne) Accept() (net.Conn, error) {
	if l.full {
		<-l.end
		return nil, net.ErrClosed
	}
	l.full = true
	return l.Listener.Accept()
}

func (l *onlyOne) Close() error {
	l.once.Do(func() { close(l.end) })
	return l.Listener.Close()
}
