package acceptq

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq/internal/sys"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/testkit"
)

// The same through Accept: after a timeout that a drain has caused, Accept keeps waiting.
func TestLateAcceptKeepsWaiting(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	accepted := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	g := &ln.intake.Gate
	require.Eventually(t, func() bool {
		g.Mu.Lock()
		defer g.Mu.Unlock()
		return g.Inside == 1
	}, testkit.Patience, time.Millisecond)

	// This does the same as sendOut, with a call that returns after sendOut has given
	// up: the call has left net's Accept, and waits for the gate.
	g.Mu.Lock()
	g.Epoch++
	g.Accepted = 1 // another loop is busy with a connection
	require.NoError(t, ln.intake.TCP.SetDeadline(time.Unix(1, 0)))
	<-time.After(20 * time.Millisecond)
	require.NoError(t, ln.intake.TCP.SetDeadline(time.Time{}))
	g.Mu.Unlock()
	c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, testkit.Received(t, accepted), "Accept must not return i/o timeout")
	require.Equal(t, 2, g.Unreturned(), "the late call must not count as the next call of the other loop")
}

// Wrap returns a second listener on the same socket. The first one keeps working.
func TestWrapLeavesTheOriginalWorking(t *testing.T) {
	original, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { original.Close() })
	before := testkit.OpenDescriptors()
	ln := mustWrap(t, original)
	require.Equal(t, before, testkit.OpenDescriptors(), "no descriptor is copied")
	require.Same(t, original, ln.TCPListener())
	require.Equal(t, -1, ln.Backlog().Requested, "the request of the first holder is unknown")

	for _, side := range []net.Listener{original, ln, original, ln} {
		testkit.AcceptAndExchange(t, side, []net.Conn{testkit.Connect(t, "tcp", original.Addr().String())})
	}
	if systemTells() {
		_, err := ln.SetBacklog(3)
		require.NoError(t, err)
		testkit.AcceptAndExchange(t, original, []net.Conn{testkit.Connect(t, "tcp", original.Addr().String())})
	}

	require.NoError(t, ln.Close())
	_, err = original.Accept()
	require.ErrorIs(t, err, net.ErrClosed, "they share one socket")
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
	require.Equal(t, unknownStats, s)
	testkit.RequireOp(t, err, "stats")
	s, err = ReadStats(ln)
	requireClosed(t, err)
	require.Equal(t, unknownStats, s)
	testkit.RequireOp(t, err, "stats")
	b, err := ln.SetBacklog(9)
	requireClosed(t, err)
	require.Equal(t, account, b)
	testkit.RequireOp(t, err, "listen")
	if systemTells() {
		w, err := Wrap(ln.TCPListener())
		require.ErrorIs(t, err, net.ErrClosed)
		require.Nil(t, w)
		testkit.RequireOp(t, err, "wrap")
	}

	require.Equal(t, account, ln.Backlog(), "it works after Close")
	require.Equal(t, account.Effective, ln.EffectiveBacklog())
}

// An error names the address, so that a log shows which listener failed.
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
	require.Equal(t, unknownStats, s)
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

// ReadStats and Wrap return an error for anything but a listening TCP socket.
func TestNoListeningSocket(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	ln := listenForStats(t)
	client := testkit.Connect(t, "tcp", ln.Addr().String())
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
		t.Logf("without Unix sockets, which this system does not have: %v", err)
	} else {
		defer unix.Close()
		conns["a unix listener"] = unix.(syscall.Conn)
		listeners["a unix listener"] = unix
	}
	if systemTells() {
		// net makes a listener of any stream socket.
		file, err := client.(*net.TCPConn).File()
		require.NoError(t, err)
		connected, err := net.FileListener(file)
		require.NoError(t, err)
		require.NoError(t, file.Close())
		defer connected.Close()
		listeners["a connected TCP socket"] = connected
	}

	before := testkit.OpenDescriptors()
	for name, c := range conns {
		t.Run("ReadStats of "+name, func(t *testing.T) {
			s, err := ReadStats(c)
			require.Equal(t, unknownStats, s)
			testkit.RequireOp(t, err, "stats")
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
			testkit.RequireOp(t, err, "wrap")
			require.ErrorIs(t, err, syscall.EINVAL)
			// The error suggests to wrap a listener inside it.
			require.Equal(t, name == "one of another type", strings.Contains(err.Error(), "inside it"), "%v", err)
		})
	}
	require.Equal(t, before, testkit.OpenDescriptors())
}

func closedUDP(t *testing.T) syscall.Conn {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, c.Close())
	return c.(syscall.Conn)
}

// Eight goroutines call all methods concurrently. Halfway one of them closes the listener.
func TestEverythingAtOnce(t *testing.T) {
	const rounds = 60
	ln := listenForStats(t, WithBacklog(64))
	clients := make([]net.Conn, 0, rounds)

	var working, half sync.WaitGroup
	// start calls f in a new goroutine. Until Close, f must succeed if the system supports
	// it.
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
			if err == nil { // from here on Close may have been called
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

// SyscallConn and Wrap of a closed Listener return an error.
func TestClosedListenerHasNoRawConn(t *testing.T) {
	if runtime.GOOS == "js" || runtime.GOOS == "wasip1" {
		t.Skip("package net keeps no descriptor here, and Control of a closed socket returns nil")
	}
	ln := listenForStats(t)
	require.NoError(t, ln.Close())
	raw, err := ln.SyscallConn()
	testkit.RequireOp(t, err, "raw-control")
	require.ErrorIs(t, err, net.ErrClosed)
	require.Nil(t, raw)
	again, err := Wrap(ln)
	testkit.RequireOp(t, err, "wrap")
	require.ErrorIs(t, err, net.ErrClosed)
	require.Nil(t, again)
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
	want, err := predict(&sys.Real, 7)
	require.NoError(t, err)
	require.Equal(t, want.Limit, b.Limit)

	b, err = ln.SetBacklog(math.MinInt)
	require.NoError(t, err)
	require.Equal(t, -1, b.Requested, "as much as the system allows")
	require.Equal(t, b.Ceiling, b.Limit)
}

// SetBacklog is granted the same limit as listening, and loses no queued client.
func TestListeningAgainKeepsTheQueue(t *testing.T) {
	if !systemTells() {
		t.Skip("this system has no second listen, see TestSetBacklogKeepsTheAccount")
	}
	ln := listenForStats(t, WithBacklog(50))
	var clients []net.Conn
	for len(clients) < 16 {
		clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
		queuedBecomes(t, len(clients), ln.Stats)
	}
	for _, n := range []int{5, 50, 0, -1, 10, 2} {
		want, err := predict(&sys.Real, n)
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
		testkit.AcceptAndExchange(t, ln, clients)
	}
	queuedBecomes(t, 0, ln.Stats)
}

func TestAccepted(t *testing.T) {
	require.Zero(t, (*Listener)(nil).Accepted())
	require.Zero(t, new(Listener).Accepted())
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	for range 3 {
		testkit.Connect(t, "tcp", ln.Addr().String())
	}
	for i, method := range []func() (net.Conn, error){
		ln.Accept,
		func() (net.Conn, error) { return ln.AcceptTCP() },
		ln.Accept,
	} {
		require.EqualValues(t, i, ln.Accepted(), "a connection that is queued is not accepted")
		c, err := method()
		require.NoError(t, err)
		c.Close()
	}
	require.NoError(t, ln.SetDeadline(time.Unix(1, 0)))
	_, err = ln.Accept()
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, ln.SetDeadline(time.Time{}))
	require.NoError(t, ln.Close())
	_, err = ln.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	require.EqualValues(t, 3, ln.Accepted(), "a call that fails is not counted, and the number stays after Close")
}

func TestHandshakesOfBadInput(t *testing.T) {
	for _, l := range []*Listener{nil, {}} {
		n, err := l.Handshakes(t.Context())
		require.ErrorIs(t, err, sys.ErrNotListening)
		require.Equal(t, unknown, n)
	}
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	n, err := ln.Handshakes(nil) //lint:ignore SA1012 the error is what is tested
	require.ErrorIs(t, err, errNilContext)
	require.Equal(t, unknown, n)
	n, err = ln.Handshakes(t.Context())
	if errors.Is(err, errors.ErrUnsupported) {
		require.Equal(t, unknown, n)
		return
	}
	require.NoError(t, err)
	require.Zero(t, n)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = ln.Handshakes(ended)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, ln.Close())
	_, err = ln.Handshakes(t.Context())
	require.ErrorIs(t, err, net.ErrClosed)
}
