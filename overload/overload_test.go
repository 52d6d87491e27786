package overload

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func listen(t testing.TB) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func connect(t testing.TB, ln net.Listener) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// tells reports whether this system reports how long a connection waited.
func tells(t *testing.T) bool {
	t.Helper()
	ln := listen(t)
	connect(t, ln)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	_, err = acceptq.QueueTime(c)
	return err == nil
}

// wait waits until every queued client has waited for longer than d.
func wait(t *testing.T, ln *acceptq.Listener, clients int, d time.Duration) {
	t.Helper()
	require.Eventually(t, func() bool {
		waiting, err := ln.Waiting(t.Context())
		return err == nil && len(waiting) == clients && waiting[clients-1].Waited > d
	}, patience, time.Millisecond)
}

func get(c net.Conn) (*http.Response, error) {
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	return http.ReadResponse(bufio.NewReader(c), nil)
}

// Late clients get 503, and the handler does no work for them. The next client is served,
// also through a chain of two ConnContexts.
func TestShedder(t *testing.T) {
	if !tells(t) {
		t.Skip("this system does not report how long a connection waited")
	}
	const budget = 100 * time.Millisecond
	ln := listen(t)
	shed := NewShedder(budget)
	var worked, seen atomic.Int64
	other := func(ctx context.Context, _ net.Conn) context.Context { seen.Add(1); return ctx }
	srv := &http.Server{
		Handler: shed.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { worked.Add(1) })),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return shed.ConnContext(other(ctx, c), c)
		},
	}
	late := []net.Conn{connect(t, ln), connect(t, ln)}
	wait(t, ln, 2, 2*budget)
	go srv.Serve(ln)
	defer srv.Close()
	for _, c := range late {
		resp, err := get(c)
		require.NoError(t, err)
		require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		require.Equal(t, "1", resp.Header.Get("Retry-After"))
		require.True(t, resp.Close)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, "overloaded: try again later\n", string(body))
	}
	require.Zero(t, worked.Load())
	require.EqualValues(t, 2, shed.Shed())
	require.NoError(t, shed.Err())
	// On a busy machine a client can be late by chance, but rarely each time.
	require.Eventually(t, func() bool {
		resp, err := get(connect(t, ln))
		return err == nil && resp.StatusCode == http.StatusOK
	}, patience, time.Millisecond)
	require.EqualValues(t, 1, worked.Load())
	require.GreaterOrEqual(t, seen.Load(), int64(3))
}

// The Listener closes late clients and returns the others.
func TestListener(t *testing.T) {
	if !tells(t) {
		t.Skip("this system does not report how long a connection waited")
	}
	const budget = 100 * time.Millisecond
	ln := listen(t)
	shed := NewShedder(budget)
	late := connect(t, ln)
	wait(t, ln, 1, 2*budget)
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := shed.Listener(ln).Accept()
		accepted <- c
	}()
	_, err := late.Read(make([]byte, 1))
	require.Error(t, err, "closed")
	require.EqualValues(t, 1, shed.Shed())
	next := connect(t, ln)
	c := <-accepted
	require.NotNil(t, c)
	defer c.Close()
	require.Equal(t, next.LocalAddr().String(), c.RemoteAddr().String())
	require.NoError(t, ln.Close())
	_, err = shed.Listener(ln).Accept()
	require.ErrorIs(t, err, net.ErrClosed)
}

// Without a budget, and where the wait is unknown, everybody is served. Err tells the second
// case.
func TestNobodyIsShed(t *testing.T) {
	ln := listen(t)
	connect(t, ln)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	none := NewShedder(0)
	require.Equal(t, t.Context(), none.ConnContext(t.Context(), c))
	require.NoError(t, none.Err())

	shed := NewShedder(time.Nanosecond)
	pipe, end := net.Pipe() // has no wait, and that says nothing about the system
	defer pipe.Close()
	defer end.Close()
	require.Equal(t, t.Context(), shed.ConnContext(t.Context(), pipe))
	require.NoError(t, shed.Err())
	if _, err := acceptq.QueueTime(c); errors.Is(err, errors.ErrUnsupported) {
		require.Equal(t, t.Context(), shed.ConnContext(t.Context(), c))
		require.ErrorIs(t, shed.Err(), errors.ErrUnsupported)
	}
	served := false
	w := httptest.NewRecorder()
	shed.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served = true })).
		ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	require.True(t, served, "a request without a known wait")

	// Another Shedder's mark does not count.
	ctx := context.WithValue(t.Context(), lateKey{none}, true)
	served = false
	shed.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served = true })).
		ServeHTTP(w, httptest.NewRequest("GET", "/", nil).WithContext(ctx))
	require.True(t, served)
}

// A server that serves one client at a time stalls while clients come, who give up after
// 100 ms and come again. Without a Shedder it works for clients that have given up, for
// ever. With one it answers in time again.
func TestRecoveryAfterAStall(t *testing.T) {
	if !tells(t) {
		t.Skip("this system does not report how long a connection waited")
	}
	without := afterAStall(t, NewShedder(0))
	with := afterAStall(t, NewShedder(50*time.Millisecond))
	t.Logf("good answers in the second after a stall: %d without, %d with a budget of 50 ms", without, with)
	require.Greater(t, with, 10*(without+1))
}

func afterAStall(t *testing.T, shed *Shedder) int64 {
	const (
		clients  = 120
		patience = 100 * time.Millisecond
		work     = 2 * time.Millisecond
	)
	ln := listen(t)
	served := make(chan struct{})
	stalled := make(chan struct{})
	go func() {
		defer close(served)
		l := shed.Listener(ln)
		<-stalled
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			<-time.After(work)
			c.Write([]byte("x"))
			c.Close()
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	var good atomic.Int64
	var crowd sync.WaitGroup
	for range clients {
		crowd.Go(func() {
			for ctx.Err() == nil {
				c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
				if err != nil {
					continue
				}
				c.SetDeadline(time.Now().Add(patience))
				if n, _ := c.Read(make([]byte, 1)); n == 1 {
					good.Add(1)
				} else {
					<-time.After(patience / 10)
				}
				c.Close()
			}
		})
	}
	<-time.After(time.Second / 2) // the stall
	close(stalled)
	<-time.After(time.Second)
	cancel()
	crowd.Wait()
	ln.Close()
	<-served
	return good.Load()
}

func check(h http.Handler) (int, string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
	return w.Code, w.Body.String()
}

// The health check fails if a client waits and none is accepted, and passes again when
// Accept works.
func TestHealth(t *testing.T) {
	const limit = 50 * time.Millisecond
	ln, idle := listen(t), listen(t)
	h := Health(limit, idle, ln)
	code, body := check(h)
	require.Equal(t, http.StatusOK, code)
	require.Equal(t, "ok\n", body)
	if _, err := ln.Stats(); err != nil {
		t.Skip("this system does not report the queue: the answer stays 200")
	}
	connect(t, ln)
	require.Eventually(t, func() bool { code, body = check(h); return code == http.StatusServiceUnavailable }, patience, time.Millisecond)
	require.Regexp(t, `^tcp 127\.0\.0\.1:\d+: a client has waited for \S+, and none was accepted meanwhile\n$`, body)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	code, _ = check(h)
	require.Equal(t, http.StatusOK, code)

	// A queue that is never empty is no failure while Accept works.
	for range 10 {
		connect(t, ln)
		connect(t, ln)
		<-time.After(limit / 4)
		c, err := ln.Accept()
		require.NoError(t, err)
		c.Close()
		code, _ = check(h)
		require.Equal(t, http.StatusOK, code)
	}
	require.NoError(t, ln.Close())
	code, body = check(h)
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, body, "the listener is closed")
}

// The first check after the limit notices it on Linux, the second one elsewhere; and a
// client that has just come to an idle server is no failure.
func TestHealthAtTheFirstCheck(t *testing.T) {
	ln := listen(t)
	if _, err := ln.Waiting(t.Context()); err != nil {
		t.Skip(err)
	}
	h := Health(50*time.Millisecond, ln).(*health)
	connect(t, ln)
	require.NoError(t, h.check(t.Context(), h.states[0].same.Add(time.Hour)), "it came a moment ago")
	h = Health(50*time.Millisecond, ln).(*health)
	wait(t, ln, 1, 60*time.Millisecond)
	require.Error(t, h.check(t.Context(), h.states[0].same.Add(time.Hour)))
}

// Health checks that share a full queue with the clients get no answer. On a port of their
// own they do.
func TestHealthNeedsItsOwnPort(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(3))
	require.NoError(t, err)
	defer ln.Close()
	if _, err := ln.Stats(); err != nil {
		t.Skip("this system does not report the queue")
	}
	for range ln.Backlog().Capacity {
		connect(t, ln)
	}
	own := httptest.NewServer(Health(time.Hour, ln))
	defer own.Close()
	check := func(addr net.Addr, n int, patience time.Duration) (answered int64) {
		var good atomic.Int64
		var checks sync.WaitGroup
		for range n {
			checks.Go(func() {
				c, err := net.DialTimeout("tcp", addr.String(), patience)
				if err != nil {
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				if _, err := get(c); err == nil {
					good.Add(1)
				}
			})
		}
		checks.Wait()
		return good.Load()
	}
	require.Zero(t, check(ln.Addr(), 7, 300*time.Millisecond))
	require.EqualValues(t, 20, check(own.Listener.Addr(), 20, patience))
}
