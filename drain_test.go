package acceptq

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// These tests run on every system, in order to find out what Drain is there:
// where the queue cannot be seen it is an error that says so. They need nothing
// but a loopback interface.

// drainable listens on loopback. It ends the test, once it has seen that Drain
// says so, where the queue cannot be seen.
func drainable(t *testing.T) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(64))
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	if s, err := ln.Stats(); err != nil || s.Queued == unknown {
		err := ln.Drain(within(t, patience))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		requireDrainOp(t, err)
		t.Skip("the queue cannot be seen here, and Drain says so:", err)
	}
	return ln
}

// requireDrained says that a drain has waited for everybody: where new clients cannot be
// kept out its error says that, and nothing else.
func requireDrained(t *testing.T, err error) {
	t.Helper()
	if runtime.GOOS == "linux" {
		require.NoError(t, err)
		return
	}
	require.ErrorIs(t, err, ErrStillOpen)
	requireDrainOp(t, err)
}

func requireDrainOp(t *testing.T, err error) {
	t.Helper()
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "drain", op.Op)
}

func TestDrainOfAnEmptyQueue(t *testing.T) {
	ln := drainable(t)
	requireDrained(t, ln.Drain(within(t, patience)))
	requireDrained(t, ln.Drain(within(t, patience)))
	_, err := ln.Stats()
	require.NoError(t, err, "Drain does not close")
	require.NoError(t, ln.Close())
}

// What waits is still there after a drain that failed, and Accept takes it.
func TestDrainWithoutAccept(t *testing.T) {
	ln := drainable(t)
	dialed(t, ln, 3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, end := range []struct {
		ctx  context.Context
		want error
	}{
		{within(t, 500*time.Millisecond), context.DeadlineExceeded},
		{ctx, context.Canceled},
	} {
		err := ln.Drain(end.ctx)
		require.ErrorIs(t, err, end.want)
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 3, de.Queued)
		if runtime.GOOS == "linux" && end.want == context.DeadlineExceeded {
			require.Zero(t, de.InFlight)
		} else { // a context that has ended leaves no time to look
			require.Equal(t, unknown, de.InFlight)
		}
	}

	drained := inBackground(t, ln, within(t, patience))
	for range 3 {
		c, err := ln.Accept()
		require.NoError(t, err)
		c.Close()
	}
	require.NoError(t, ln.SetDeadline(time.Now().Add(-time.Second)))
	_, err := ln.Accept()
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	requireDrained(t, received(t, drained))
}

func TestDrainClosed(t *testing.T) {
	ln := drainable(t)
	require.NoError(t, ln.Close())
	err := ln.Drain(within(t, patience))
	require.ErrorIs(t, err, net.ErrClosed)
	requireDrainOp(t, err)
}

func TestDrainConcurrentWithClose(t *testing.T) {
	ln := drainable(t)
	dialed(t, ln, 1)
	var drained []chan error
	for range 4 {
		drained = append(drained, inBackground(t, ln, within(t, patience)))
	}
	require.Eventually(t, func() bool {
		ln.intake.mu.Lock()
		defer ln.intake.mu.Unlock()
		return ln.intake.running == 4
	}, patience, time.Millisecond)
	require.NoError(t, ln.Close())
	for _, d := range drained {
		require.ErrorIs(t, received(t, d), net.ErrClosed)
	}
	require.Zero(t, ln.intake.running)
}

func TestDrainOfNothing(t *testing.T) {
	err := new(Listener).Drain(t.Context())
	require.ErrorIs(t, err, errNotListening)
	requireDrainOp(t, err)

	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	err = ln.Drain(nil) //lint:ignore SA1012 that is what is tested
	require.Error(t, err)
	requireDrainOp(t, err)
}

func TestDrainErrorText(t *testing.T) {
	err := &DrainError{Queued: 2, InFlight: unknown, HeldBack: unknown, err: context.Canceled}
	require.Equal(t, "context canceled: 2 queued, unknown in flight", err.Error())
	err = &DrainError{InFlight: 3, HeldBack: 4, Accepted: 1, err: context.Canceled}
	require.Equal(t, "context canceled: 0 queued, 3 in flight, 4 held back, 1 accepted by a loop that has not called Accept again", err.Error())
	require.ErrorIs(t, err, context.Canceled)
}

// The user's deadlines and a drain, which has one of its own in the same place,
// do not see each other.
func TestDrainAndDeadlines(t *testing.T) {
	ln := drainable(t)
	accepted := make(chan error, 1)
	accept := func() {
		c, err := ln.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}

	t.Run("none: Accept goes on waiting", func(t *testing.T) {
		go accept()
		for range rounds(20) {
			requireDrained(t, ln.Drain(within(t, patience)))
		}
		require.Empty(t, accepted)
	})
	t.Run("one that is set afterwards fires", func(t *testing.T) {
		require.NoError(t, ln.SetDeadline(time.Now().Add(time.Millisecond)))
		require.ErrorIs(t, received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("one that has passed stays", func(t *testing.T) {
		requireDrained(t, ln.Drain(within(t, patience)))
		go accept()
		require.ErrorIs(t, received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("one that is set before fires afterwards", func(t *testing.T) {
		require.NoError(t, ln.SetDeadline(time.Now().Add(300*time.Millisecond)))
		go accept()
		for len(accepted) == 0 {
			requireDrained(t, ln.Drain(within(t, patience)))
		}
		require.ErrorIs(t, received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("many that are set meanwhile", func(t *testing.T) {
		require.NoError(t, ln.SetDeadline(time.Time{}))
		stop := make(chan struct{})
		var setter sync.WaitGroup
		setter.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					ln.SetDeadline(time.Now().Add(time.Hour))
				}
			}
		})
		go accept()
		for range rounds(50) {
			requireDrained(t, ln.Drain(within(t, patience)))
		}
		require.Empty(t, accepted)
		close(stop)
		setter.Wait()
		require.NoError(t, ln.SetDeadline(time.Now()))
		require.ErrorIs(t, received(t, accepted), os.ErrDeadlineExceeded)
	})
}

// acceptLoops starts n loops that accept until the listener closes, and waits
// until all of them are in Accept.
func acceptLoops(t *testing.T, ln *Listener, n int, deal func(net.Conn)) (running *sync.WaitGroup) {
	t.Helper()
	running = new(sync.WaitGroup)
	for range n {
		running.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					if !errors.Is(err, net.ErrClosed) {
						t.Error(err)
					}
					return
				}
				deal(c)
			}
		})
	}
	require.Eventually(t, func() bool {
		ln.gate.mu.Lock()
		defer ln.gate.mu.Unlock()
		return ln.gate.inside == n
	}, patience, time.Millisecond)
	return running
}

// A loop that has taken a connection and is not back has not dealt with it,
// whatever the others do.
func TestDrainWaitsForEachLoop(t *testing.T) {
	ln := drainable(t)
	hold, taken := make(chan struct{}), make(chan struct{}, 3)
	var first atomic.Bool
	running := acceptLoops(t, ln, 2, func(c net.Conn) {
		defer c.Close()
		taken <- struct{}{}
		if first.CompareAndSwap(false, true) {
			<-hold
		}
	})
	for range 3 { // the first to one loop, the others to the other
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
		require.NoError(t, err)
		defer c.Close()
		<-taken
	}

	err := ln.Drain(within(t, 200*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de, "one of the two has come back, the other not")
	require.Zero(t, de.Queued)
	close(hold)
	requireDrained(t, ln.Drain(within(t, patience)))
	require.NoError(t, ln.Close())
	running.Wait()
}

// A drain ends at whatever moment while loops accept: each connection that was
// queued when it began has been dealt with by then. What a loop does with a
// connection takes no time, some, or more.
func TestDrainWaitsForEachConnection(t *testing.T) {
	const queued = 24
	for _, loops := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(loops, " loops"), func(t *testing.T) {
			for round := range rounds(40) {
				ln := drainable(t)
				start := make(chan struct{})
				var taken, dealt atomic.Int64
				running := acceptLoops(t, ln, loops, func(c net.Conn) {
					taken.Add(1)
					<-start
					switch rand.IntN(4) {
					case 0:
						runtime.Gosched()
					case 1:
						<-time.After(time.Duration(rand.IntN(2000)) * time.Microsecond)
					}
					c.Close()
					dealt.Add(1)
				})
				for range loops { // one each, on which they wait
					c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
					require.NoError(t, err)
					defer c.Close()
				}
				require.Eventually(t, func() bool { return taken.Load() == int64(loops) }, patience, time.Millisecond)
				dialed(t, ln, queued)
				close(start)

				err := ln.Drain(within(t, patience))
				n := dealt.Load()
				require.NoError(t, ln.Close())
				running.Wait()
				requireDrained(t, err)
				// Another program may have dialed a port that was its own before.
				require.GreaterOrEqual(t, n, int64(loops+queued), "round %d", round)
			}
		})
	}
}

// Drains beside each other, beside Accept, deadlines and Stats, to an end.
func TestDrainConcurrently(t *testing.T) {
	ln := drainable(t)
	var all sync.WaitGroup
	var dealt atomic.Int64
	start := make(chan struct{})
	loops := acceptLoops(t, ln, 4, func(c net.Conn) {
		<-start
		c.Close()
		dealt.Add(1)
	})
	for range 4 {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
		require.NoError(t, err)
		defer c.Close()
	}
	require.Eventually(t, func() bool {
		ln.gate.mu.Lock()
		defer ln.gate.mu.Unlock()
		return ln.gate.accepted == 4
	}, patience, time.Millisecond)
	dialed(t, ln, 24) // DragonFly tells fewer than 32
	close(start)
	for range 8 {
		all.Go(func() {
			for range rounds(20) {
				if err := ln.Drain(within(t, patience)); err != nil && !errors.Is(err, ErrStillOpen) {
					t.Error(err)
				}
				if n := dealt.Load(); n != 28 {
					t.Errorf("ended at %d", n)
				}
				if err := ln.SetDeadline(time.Now().Add(time.Hour)); err != nil {
					t.Error(err)
				}
				if _, err := ln.Stats(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	require.NoError(t, ln.Close())
	loops.Wait()
	require.EqualValues(t, 28, dealt.Load())
}

// A loop that took a connection and does not call Accept again has nothing that Close
// could reset. It is waited for a second, and counted while it is.
func TestDrainOfLoopsThatDoNotReturn(t *testing.T) {
	t.Run("a loop that has ended", func(t *testing.T) {
		ln := drainable(t)
		dialed(t, ln, 2)
		for range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			defer c.Close()
		}
		err := ln.Drain(within(t, 100*time.Millisecond))
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 1, de.Accepted)
		require.Zero(t, de.Queued)
		requireDrained(t, ln.Drain(within(t, patience)))
	})
	t.Run("a loop that waits for room before it accepts", func(t *testing.T) {
		ln := drainable(t)
		room := make(chan struct{}, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				room <- struct{}{}
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
			}
		}()
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
		require.NoError(t, err)
		defer c.Close()
		require.Eventually(t, func() bool { return ln.gate.unreturned() == 1 }, patience, time.Millisecond)
		requireDrained(t, ln.Drain(within(t, patience)))
		require.NoError(t, ln.Close())
		<-room
		<-done
	})
	t.Run("a loop that drains", func(t *testing.T) {
		ln := drainable(t)
		dialed(t, ln, 1)
		c, err := ln.Accept()
		require.NoError(t, err)
		defer c.Close()
		requireDrained(t, ln.Drain(within(t, patience)))
	})
}
