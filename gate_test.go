package acceptq

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func newGate() *gate {
	g := new(gate)
	g.moved.L = &g.mu
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
		epoch := g.enter(false)
		for range times {
			require.False(t, g.settled(ln, 20*drainLook), "a call is inside")
		}
		require.True(t, g.leave(epoch, os.ErrDeadlineExceeded), "interrupted %d times", times)
		epoch = g.enter(true)
		require.False(t, g.leave(epoch, os.ErrDeadlineExceeded), "no call was interrupted since")
		require.True(t, g.settled(ln, 20*drainLook))
	}
}

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
	g := &ln.intake.gate
	require.Eventually(t, func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.inside == 1
	}, patience, time.Millisecond)

	// This does the same as sendOut, with a call that returns after sendOut has given
	// up: the call has left net's Accept, and waits for the gate.
	g.mu.Lock()
	g.epoch++
	g.accepted = 1 // another loop is busy with a connection
	require.NoError(t, ln.intake.tcp.SetDeadline(time.Unix(1, 0)))
	<-time.After(20 * time.Millisecond)
	require.NoError(t, ln.intake.tcp.SetDeadline(time.Time{}))
	g.mu.Unlock()
	c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, received(t, accepted), "Accept must not return i/o timeout")
	require.Equal(t, 2, g.unreturned(), "the late call must not count as the next call of the other loop")
}

// A second drain waits until the first has opened the gate again, and so does SetDeadline.
// Otherwise the first drain would overwrite their deadlines.
func TestGateIsShutByOneAtATime(t *testing.T) {
	ln := anyListener(t)
	for name, act := range map[string]func(*gate) error{
		"settled": func(g *gate) error {
			if g.settled(ln, 20*drainLook) {
				return errors.New("settled, with a call inside")
			}
			return nil
		},
		"setDeadline": func(g *gate) error { return g.setDeadline(ln, time.Now().Add(-time.Second)) },
		"enter":       func(g *gate) error { g.enter(false); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate()
			g.inside, g.shut = 1, true // the first drain has shut the gate
			done := make(chan error, 1)
			go func() { done <- act(g) }()
			select {
			case <-done:
				t.Fatal("it did not wait for the first drain")
			case <-time.After(50 * time.Millisecond):
			}
			g.mu.Lock()
			require.True(t, g.shut, "the first drain must still hold the gate shut")
			require.Zero(t, g.deadline)
			require.Zero(t, g.epoch)
			require.Equal(t, 1, g.inside)
			g.shut = false
			g.moved.Broadcast()
			g.mu.Unlock()
			require.NoError(t, received(t, done))
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
		g.leave(g.enter(true), nil)
	}
	require.Equal(t, 3, g.unreturned())
	require.False(t, g.settled(ln, 20*drainLook))
	epoch := g.enter(true) // interrupted and repeated: the user has not called Accept again
	g.epoch++
	require.True(t, g.leave(epoch, os.ErrDeadlineExceeded))
	require.Equal(t, 3, g.unreturned())
	for range 5 { // a loop that polls with deadlines does not stand in for the others
		g.leave(g.enter(true), os.ErrDeadlineExceeded)
		require.Equal(t, 3, g.unreturned())
		g.enter(false)
		require.Equal(t, 3, g.unreturned())
		g.inside--
	}
	for range 3 {
		require.False(t, g.settled(ln, 20*drainLook))
		g.enter(false)
		g.inside--
	}
	require.Zero(t, g.unreturned())
	require.True(t, g.settled(ln, 20*drainLook))
	g.leave(g.enter(false), os.ErrDeadlineExceeded)
	require.Zero(t, g.unreturned(), "a new loop has no connection")
}
