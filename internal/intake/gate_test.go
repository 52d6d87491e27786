package intake

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/testkit"
)

func newGate() *gate {
	g := new(gate)
	g.moved.L = &g.Mu
	return g
}

func anyListener(t *testing.T) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

// A drain interrupts calls of Accept. An interrupted call can be so late that the gate is
// open again when it leaves, or even that the next call was interrupted too. Its timeout
// error does not come from a deadline of the user.
func TestGateRecognizesALateCall(t *testing.T) {
	ln := anyListener(t)
	for _, times := range []int{1, 2} {
		g := newGate()
		epoch := g.Enter(false)
		for range times {
			require.False(t, g.settled(ln, 20*DrainLook), "a call is inside")
		}
		require.True(t, g.Leave(epoch, os.ErrDeadlineExceeded), "interrupted %d times", times)
		epoch = g.Enter(true)
		require.False(t, g.Leave(epoch, os.ErrDeadlineExceeded), "no call was interrupted since")
		require.True(t, g.settled(ln, 20*DrainLook))
	}
}

// A second drain waits until the first has opened the gate again, and so does SetDeadline.
// Otherwise the first drain would overwrite their deadlines.
func TestGateIsShutByOneAtATime(t *testing.T) {
	ln := anyListener(t)
	for name, act := range map[string]func(*gate) error{
		"settled": func(g *gate) error {
			if g.settled(ln, 20*DrainLook) {
				return errors.New("settled, with a call inside")
			}
			return nil
		},
		"setDeadline": func(g *gate) error { return g.SetDeadline(ln, time.Now().Add(-time.Second)) },
		"enter":       func(g *gate) error { g.Enter(false); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate()
			g.Inside, g.shut = 1, true // the first drain has shut the gate
			done := make(chan error, 1)
			go func() { done <- act(g) }()
			select {
			case <-done:
				t.Fatal("it did not wait for the first drain")
			case <-time.After(50 * time.Millisecond):
			}
			g.Mu.Lock()
			require.True(t, g.shut, "the first drain must still hold the gate shut")
			require.Zero(t, g.deadline)
			require.Zero(t, g.Epoch)
			require.Equal(t, 1, g.Inside)
			g.shut = false
			g.moved.Broadcast()
			g.Mu.Unlock()
			require.NoError(t, testkit.Received(t, done))
			if name == "setDeadline" {
				_, err := ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			}
		})
	}
}

// A connection that Accept has returned counts until the next call of Accept.
func TestGateCountsWhatWasAccepted(t *testing.T) {
	ln := anyListener(t)
	g := newGate()
	for range 3 {
		g.Leave(g.Enter(true), nil)
	}
	require.Equal(t, 3, g.Unreturned())
	require.False(t, g.settled(ln, 20*DrainLook))
	epoch := g.Enter(true) // interrupted and repeated: the user has not called Accept again
	g.Epoch++
	require.True(t, g.Leave(epoch, os.ErrDeadlineExceeded))
	require.Equal(t, 3, g.Unreturned())
	for range 5 { // a loop that polls with deadlines does not stand in for the others
		g.Leave(g.Enter(true), os.ErrDeadlineExceeded)
		require.Equal(t, 3, g.Unreturned())
		g.Enter(false)
		require.Equal(t, 3, g.Unreturned())
		g.Inside--
	}
	for range 3 {
		require.False(t, g.settled(ln, 20*DrainLook))
		g.Enter(false)
		g.Inside--
	}
	require.Zero(t, g.Unreturned())
	require.True(t, g.settled(ln, 20*DrainLook))
	g.Leave(g.Enter(false), os.ErrDeadlineExceeded)
	require.Zero(t, g.Unreturned(), "a new loop has no connection")
}
