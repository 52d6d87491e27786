package acceptq

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// most is the capacity for the largest argument of listen(2), capped to int.
var most = saturate(math.MaxInt32 + 1)

// beyond is a number whose lower 32 bits, which listen(2) uses, are 5; capped to int.
var beyond = saturate(1<<32 + 5)

// A tcpListener has the methods of a *net.TCPListener.
type tcpListener interface {
	net.Listener
	syscall.Conn
	AcceptTCP() (*net.TCPConn, error)
	SetDeadline(time.Time) error
	File() (*os.File, error)
}

// onFakeNet reports that package net is only simulated here, without descriptors and
// WithControl.
const onFakeNet = runtime.GOOS == "js" || runtime.GOOS == "wasip1"

// connect connects a client, which is closed when the test ends.
func connect(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, address)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// accept returns the next connection of ln. It has a time limit.
func accept(t *testing.T, ln tcpListener) *net.TCPConn {
	t.Helper()
	require.NoError(t, ln.SetDeadline(time.Now().Add(20*time.Second)))
	c, err := ln.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, ln.SetDeadline(time.Time{}))
	return c
}

// patience is longer than any operation in these tests takes.
const patience = 20 * time.Second

// rounds returns n, or a fifth of it with -short.
func rounds(n int) int {
	if testing.Short() {
		return max(n/5, 1)
	}
	return n
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// dialed connects n clients, and waits until all of them are in the queue.
func dialed(t *testing.T, ln *Listener, n int) (clients []net.Conn) {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	before := s.Queued
	for range n {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == before+n
	}, patience, time.Millisecond)
	return clients
}

// inBackground runs Drain in a goroutine.
func inBackground(t *testing.T, ln interface{ Drain(context.Context) error }, ctx context.Context) (result chan error) {
	result = make(chan error, 1)
	go func() { result <- ln.Drain(ctx) }()
	return result
}

func received(t *testing.T, from chan error) error {
	t.Helper()
	select {
	case err := <-from:
		return err
	case <-time.After(patience):
		t.Fatal("still waiting")
		return nil
	}
}

// refused requires that listening fails, and returns the error. It requires that no
// descriptor and no goroutine is left.
func refused[L net.Listener](t *testing.T, listen func() (L, error)) error {
	t.Helper()
	goroutines := goleak.IgnoreCurrent()
	descriptors := openDescriptors()
	ln, err := listen()
	require.Error(t, err)
	require.Nil(t, ln)
	goleak.VerifyNone(t, goroutines) // first, because lookups of net end after a canceled call
	require.Equal(t, descriptors, openDescriptors(), "descriptors left behind")

	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	return err
}

// requireSameError requires that an error has the same text, the same layers and the
// same cause as that of net.
func requireSameError(t *testing.T, want, got error) {
	t.Helper()
	require.EqualError(t, got, want.Error())
	wantLayers, wantCause := layers(want)
	gotLayers, gotCause := layers(got)
	require.Equal(t, wantLayers, gotLayers)
	require.Equal(t, wantCause, gotCause)
}

func layers(err error) (types []string, cause error) {
	for ; err != nil; err = errors.Unwrap(err) {
		types, cause = append(types, fmt.Sprintf("%T", err)), err
	}
	return types, cause
}

// freeAgain requires that the address is free. Another program may have used the port
// meanwhile. It releases the port at some time; a leak does not.
func freeAgain(t *testing.T, network, address string) {
	t.Helper()
	require.Eventually(t, func() bool {
		ln, err := net.Listen(network, address)
		return err == nil && ln.Close() == nil
	}, 20*time.Second, time.Millisecond, "%s is held", address)
}

// requireListenError checks the form of the error of a failed Listen.
func requireListenError(t *testing.T, ln *Listener, err error) {
	t.Helper()
	require.Nil(t, ln)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	require.Equal(t, "tcp", op.Net)
}

// systemTells reports whether the accept queue can be read on this system.
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

// queuedBecomes waits until the listener reports n queued connections. The handshake of
// a client can end before that of the server.
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

// acceptAndExchange accepts one connection and exchanges a byte with the client that it
// belongs to.
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
	t.Fatalf("%v was accepted but is not one of the clients", server.RemoteAddr())
}

func mustWrap(t testing.TB, ln net.Listener) *Listener {
	t.Helper()
	w, err := Wrap(ln)
	require.NoError(t, err)
	return w
}

// requireClosed requires the error of a closed socket. On a system that reports nothing
// about sockets the error may be ErrUnsupported instead: net on js does not know which
// sockets are closed.
func requireClosed(t *testing.T, err error) {
	t.Helper()
	if !systemTells() && errors.Is(err, errors.ErrUnsupported) {
		return
	}
	require.ErrorIs(t, err, net.ErrClosed)
}

// requireOp requires exactly one *net.OpError, with the given Op, around the cause.
func requireOp(t *testing.T, err error, name string) {
	t.Helper()
	var op, inner *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, name, op.Op)
	require.False(t, errors.As(op.Err, &inner), "an OpError in an OpError: %v", err)
}

// connectAll connects clients, several at a time. All of them must get in. They are
// closed when the test ends.
func connectAll(t *testing.T, addr net.Addr, clients int) []net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conns, errs := make([]net.Conn, clients), make([]error, clients)
	each(clients, func(i int) {
		conns[i], errs[i] = dialSpread(ctx, addr)
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

// dialSpread connects a client to a group. DragonFly gives a client a port whose connection
// belongs to the processor that the client runs on, so that on several processors local
// clients do not spread evenly. A port that the client chooses has any hash.
func dialSpread(ctx context.Context, addr net.Addr) (c net.Conn, err error) {
	if runtime.GOOS != "dragonfly" {
		return new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
	}
	for range 20 { // the port may be in use
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: addr.(*net.TCPAddr).IP, Port: 1024 + rand.IntN(64000)}}
		if c, err = d.DialContext(ctx, addr.Network(), addr.String()); err == nil {
			break
		}
	}
	return c, err
}

// each calls f with 0 to n-1, with a maximum of 50 calls at a time.
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

// unknownStats is a Stats without a known number.
var unknownStats = Stats{Queued: -1, Incomplete: -1, Limit: -1, Capacity: -1, Drops: -1}

// shardsOf returns the shards of s.
func shardsOf(s *Shards) []*Listener { return slices.Collect(s.All()) }

// listenIPv4 listens on a free port of 127.0.0.1 until the test ends.
func listenIPv4(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "tcp4", "127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}
