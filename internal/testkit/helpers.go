package testkit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// A TCPListener has the methods of a *net.TCPListener.
type TCPListener interface {
	net.Listener
	syscall.Conn
	AcceptTCP() (*net.TCPConn, error)
	SetDeadline(time.Time) error
	File() (*os.File, error)
}

// OnFakeNet reports that package net is only simulated here, without descriptors and
// WithControl.
const OnFakeNet = runtime.GOOS == "js" || runtime.GOOS == "wasip1"

// Connect connects a client, which is closed when the test ends.
func Connect(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, address)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// Patience is longer than any operation in these tests takes.
const Patience = 20 * time.Second

func Within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// InBackground runs Drain in a goroutine.
func InBackground(t *testing.T, ln interface{ Drain(context.Context) error }, ctx context.Context) (result chan error) {
	result = make(chan error, 1)
	go func() { result <- ln.Drain(ctx) }()
	return result
}

func Received(t *testing.T, from chan error) error {
	t.Helper()
	select {
	case err := <-from:
		return err
	case <-time.After(Patience):
		t.Fatal("still waiting")
		return nil
	}
}

// Refused requires that listening fails, and returns the error. It requires that no
// descriptor and no goroutine is left.
func Refused[L net.Listener](t *testing.T, listen func() (L, error)) error {
	t.Helper()
	goroutines := goleak.IgnoreCurrent()
	descriptors := OpenDescriptors()
	ln, err := listen()
	require.Error(t, err)
	require.Nil(t, ln)
	goleak.VerifyNone(t, goroutines) // first, because lookups of net end after a canceled call
	require.Equal(t, descriptors, OpenDescriptors(), "descriptors left behind")

	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	return err
}

// RequireSameError requires that an error has the same text, the same layers and the
// same cause as that of net.
func RequireSameError(t *testing.T, want, got error) {
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

// FreeAgain requires that the address is free. Another program may have used the port
// meanwhile. It releases the port at some time; a leak does not.
func FreeAgain(t *testing.T, network, address string) {
	t.Helper()
	require.Eventually(t, func() bool {
		ln, err := net.Listen(network, address)
		return err == nil && ln.Close() == nil
	}, 20*time.Second, time.Millisecond, "%s is held", address)
}

// AcceptAndExchange accepts one connection and exchanges a byte with the client that it
// belongs to.
func AcceptAndExchange(t testing.TB, ln net.Listener, clients []net.Conn) {
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

// RequireOp requires exactly one *net.OpError, with the given Op, around the cause.
func RequireOp(t *testing.T, err error, name string) {
	t.Helper()
	var op, inner *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, name, op.Op)
	require.False(t, errors.As(op.Err, &inner), "an OpError in an OpError: %v", err)
}

// ConnectAll connects clients, several at a time. All of them must get in. They are
// closed when the test ends.
func ConnectAll(t *testing.T, addr net.Addr, clients int) []net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	conns, errs := make([]net.Conn, clients), make([]error, clients)
	Each(clients, func(i int) {
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

// Each calls f with 0 to n-1, with a maximum of 50 calls at a time.
func Each(n int, f func(i int)) {
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
