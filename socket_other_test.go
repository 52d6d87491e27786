//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package acceptq

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/stretchr/testify/require"
)

// Listening as in the README works here too, and serves clients.
func TestNetListensHere(t *testing.T) {
	for _, n := range []int{-1, 0, 128} {
		ln, err := ListenTCP(":0", WithBacklog(n))
		require.NoError(t, err)
		defer ln.Close()

		accepted := make(chan error, 1)
		go func() {
			conn, err := ln.Accept()
			if err == nil {
				_, err = io.WriteString(conn, "hello")
				err = errors.Join(err, conn.Close())
			}
			accepted <- err
		}()
		_, port, err := net.SplitHostPort(ln.Addr().String())
		require.NoError(t, err)
		client, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
		require.NoError(t, err)
		defer client.Close()
		text, err := io.ReadAll(client)
		require.NoError(t, err)
		require.Equal(t, "hello", string(text))
		require.NoError(t, <-accepted)

		require.Equal(t, unknown, ln.EffectiveBacklog())
		account := ln.Backlog()
		require.Equal(t, Backlog{Requested: n, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, account)
		require.False(t, account.Clamped())
		asJSON, err := json.Marshal(account)
		require.NoError(t, err)
		require.Contains(t, string(asJSON), `"ceiling":null,"limit":null,"effective":null,"capacity":null,"measured":false`)

		require.NoError(t, ln.Close())
		require.Equal(t, account, ln.Backlog(), "after Close")
		_, err = ln.Accept()
		require.ErrorIs(t, err, net.ErrClosed)
	}
}

func TestNothingIsPredictedHere(t *testing.T) {
	b, err := predict(&sys.Real, 4096)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.Equal(t, Backlog{Requested: 4096, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, b)
}

func TestZeroListenerKnowsNothing(t *testing.T) {
	var ln Listener
	require.Equal(t, unknown, ln.EffectiveBacklog())
	require.Equal(t, Backlog{Requested: -1, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, ln.Backlog())
}

// controlCalled reports whether net calls a Control function on this system.
func controlCalled(t *testing.T) (called bool) {
	t.Helper()
	lc := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
		called = true
		return nil
	}}
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	return called
}

// An option that cannot be honored is an error, and no port stays bound.
func TestOptionsThatCannotBeHonoured(t *testing.T) {
	options := map[string]Option{
		"strict":    WithStrictBacklog(),
		"reuseport": WithReusePort(),
	}
	if !controlCalled(t) {
		options["control"] = WithControl(func(string, string, syscall.RawConn) error { return nil })
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := free.Addr().String()
	require.NoError(t, free.Close())
	for name, option := range options {
		t.Run(name, func(t *testing.T) {
			ln, err := ListenTCP(addr, option)
			require.Nil(t, ln)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			var op *net.OpError
			require.ErrorAs(t, err, &op)
			require.Equal(t, "listen", op.Op)
			require.Equal(t, "tcp", op.Net)

			again, err := net.Listen("tcp", addr)
			require.NoError(t, err)
			require.NoError(t, again.Close())
		})
	}
}

func TestControlIsCalledWhereNetCallsIt(t *testing.T) {
	if !controlCalled(t) {
		t.Skip("net calls no Control hook here: TestOptionsThatCannotBeHonoured has the error")
	}
	var order []string
	hook := func(name string, err error) Option {
		return WithControl(func(network, address string, c syscall.RawConn) error {
			require.Equal(t, "tcp4", network)
			require.NoError(t, c.Control(func(uintptr) {}))
			order = append(order, name)
			return err
		})
	}
	ln, err := ListenTCP("127.0.0.1:0", hook("first", nil), hook("second", nil))
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	require.Equal(t, []string{"first", "second"}, order)

	_, err = ListenTCP("127.0.0.1:0", hook("third", io.ErrUnexpectedEOF), hook("fourth", nil))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Equal(t, []string{"first", "second", "third"}, order)
}

func TestBadInputHere(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Listen(ended, "tcp", "127.0.0.1:0")
	require.ErrorIs(t, err, context.Canceled)

	var noContext context.Context
	for name, listen := range map[string]func() (*Listener, error){
		"nil context": func() (*Listener, error) { return Listen(noContext, "tcp", "127.0.0.1:0") },
		"nil Control": func() (*Listener, error) { return ListenTCP("127.0.0.1:0", WithControl(nil)) },
		"unix":        func() (*Listener, error) { return Listen(t.Context(), "unix", "socket") },
		"udp":         func() (*Listener, error) { return Listen(t.Context(), "udp", "127.0.0.1:0") },
		"no address":  func() (*Listener, error) { return ListenTCP("127.0.0.1") },
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := listen()
			require.Nil(t, ln)
			var op *net.OpError
			require.ErrorAs(t, err, &op)
			require.Equal(t, "listen", op.Op)
		})
	}
}
