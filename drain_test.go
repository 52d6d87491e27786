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

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// These tests run on every system and need only a loopback interface. Where the queue
// cannot be read, Drain must return an error that says so.

// drainable listens on loopback. If the queue cannot be read here, it checks the error of
// Drain and skips the test.
func drainable(t *testing.T) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(64))
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	if s, err := ln.Stats(); err != nil || s.Queued == unknown {
		err := ln.Drain(testkit.Within(t, testkit.Patience))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		testkit.RequireDrainOp(t, err)
		t.Skip("the queue cannot be read here, and Drain says so:", err)
	}
	return ln
}

// requireDrained requires that a drain has waited for every client. On a system that
// cannot keep new clients out, the error must be ErrStillOpen and nothing else.
func requireDrained(t *testing.T, err error) {
	t.Helper()
	if runtime.GOOS == "linux" {
		require.NoError(t, err)
		return
	}
	require.ErrorIs(t, err, ErrStillOpen)
	testkit.RequireDrainOp(t, err)
}

func TestDrainOfAnEmptyQueue(t *testing.T) {
	ln := drainable(t)
	requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	_, err := ln.Stats()
	require.NoError(t, err, "Drain must not close the listener")
	require.NoError(t, ln.Close())
}

// Queued connections stay in the queue after a failed drain, and Accept returns them.
func TestDrainWithoutAccept(t *testing.T) {
	ln := drainable(t)
	dialed(t, ln, 3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, end := range []struct {
		ctx  context.Context
		want error
	}{
		{testkit.Within(t, 500*time.Millisecond), context.DeadlineExceeded},
		{ctx, context.Canceled},
	} {
		err := ln.Drain(end.ctx)
		require.ErrorIs(t, err, end.want)
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 3, de.Queued)
		if runtime.GOOS == "linux" && end.want == context.DeadlineExceeded {
			require.Zero(t, de.InFlight)
		} else { // with an ended context the drain does not read the queue
			require.Equal(t, unknown, de.InFlight)
		}
	}

	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	for range 3 {
		c, err := ln.Accept()
		require.NoError(t, err)
		c.Close()
	}
	require.NoError(t, ln.SetDeadline(time.Now().Add(-time.Second)))
	_, err := ln.Accept()
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	requireDrained(t, testkit.Received(t, drained))
}

func TestDrainClosed(t *testing.T) {
	ln := drainable(t)
	require.NoError(t, ln.Close())
	err := ln.Drain(testkit.Within(t, testkit.Patience))
	require.ErrorIs(t, err, net.ErrClosed)
	testkit.RequireDrainOp(t, err)
}

func TestDrainConcurrentWithClose(t *testing.T) {
	ln := drainable(t)
	dialed(t, ln, 1)
	var drained []chan error
	for range 4 {
		drained = append(drained, testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience)))
	}
	require.Eventually(t, func() bool {
		ln.intake.Mu.Lock()
		defer ln.intake.Mu.Unlock()
		return ln.intake.Running == 4
	}, testkit.Patience, time.Millisecond)
	require.NoError(t, ln.Close())
	for _, d := range drained {
		require.ErrorIs(t, testkit.Received(t, d), net.ErrClosed)
	}
	require.Zero(t, ln.intake.Running)
}

func TestDrainOfNothing(t *testing.T) {
	err := new(Listener).Drain(t.Context())
	require.ErrorIs(t, err, sys.ErrNotListening)
	testkit.RequireDrainOp(t, err)

	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	err = ln.Drain(nil) //lint:ignore SA1012 that is what is tested
	require.Error(t, err)
	testkit.RequireDrainOp(t, err)
}

func TestDrainErrorText(t *testing.T) {
	err := &DrainError{Queued: 2, InFlight: unknown, HeldBack: unknown, err: context.Canceled}
	require.Equal(t, "context canceled: 2 queued, unknown in flight", err.Error())
	err = &DrainError{InFlight: 3, HeldBack: 4, Accepted: 1, err: context.Canceled}
	require.Equal(t, "context canceled: 0 queued, 3 in flight, 4 held back, 1 accepted by a loop that has not called Accept again", err.Error())
	require.ErrorIs(t, err, context.Canceled)
}

// A drain uses the deadline of the socket for its own purpose. It must not disturb the
// deadlines that the user sets.
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

	t.Run("no deadline: Accept keeps waiting", func(t *testing.T) {
		go accept()
		for range rounds(20) {
			requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		}
		require.Empty(t, accepted)
	})
	t.Run("a deadline set after the drain fires", func(t *testing.T) {
		require.NoError(t, ln.SetDeadline(time.Now().Add(time.Millisecond)))
		require.ErrorIs(t, testkit.Received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("a passed deadline stays in force", func(t *testing.T) {
		requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		go accept()
		require.ErrorIs(t, testkit.Received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("a deadline set before the drain fires after it", func(t *testing.T) {
		require.NoError(t, ln.SetDeadline(time.Now().Add(300*time.Millisecond)))
		go accept()
		for len(accepted) == 0 {
			requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		}
		require.ErrorIs(t, testkit.Received(t, accepted), os.ErrDeadlineExceeded)
	})
	t.Run("many deadlines set during the drain", func(t *testing.T) {
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
			requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		}
		require.Empty(t, accepted)
		close(stop)
		setter.Wait()
		require.NoError(t, ln.SetDeadline(time.Now()))
		require.ErrorIs(t, testkit.Received(t, accepted), os.ErrDeadlineExceeded)
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
		ln.intake.Gate.Mu.Lock()
		defer ln.intake.Gate.Mu.Unlock()
		return ln.intake.Gate.Inside == n
	}, testkit.Patience, time.Millisecond)
	return running
}

// A loop that has accepted a connection is assumed to be busy with it until the loop calls
// Accept again, whatever the other loops do.
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
	for range 3 { // one loop gets the first, the other loop gets the rest
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		defer c.Close()
		<-taken
	}

	err := ln.Drain(testkit.Within(t, 200*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de, "one of the two loops has called Accept again, the other has not")
	require.Zero(t, de.Queued)
	close(hold)
	requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	require.NoError(t, ln.Close())
	running.Wait()
}

// Loops accept while a drain runs. When the drain ends, the loops must have finished with
// each connection that was queued when it began. The loops take no time, some time or more
// time for a connection.
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
				for range loops { // one for each loop, which blocks on it
					c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
					require.NoError(t, err)
					defer c.Close()
				}
				require.Eventually(t, func() bool { return taken.Load() == int64(loops) }, testkit.Patience, time.Millisecond)
				dialed(t, ln, queued)
				close(start)

				err := ln.Drain(testkit.Within(t, testkit.Patience))
				n := dealt.Load()
				require.NoError(t, ln.Close())
				running.Wait()
				requireDrained(t, err)
				// Another program may have connected to a port that it used before.
				require.GreaterOrEqual(t, n, int64(loops+queued), "round %d", round)
			}
		})
	}
}

// Drains run concurrently with each other, with Accept, deadlines and Stats, and all end.
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
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		defer c.Close()
	}
	require.Eventually(t, func() bool {
		ln.intake.Gate.Mu.Lock()
		defer ln.intake.Gate.Mu.Unlock()
		return ln.intake.Gate.Accepted == 4
	}, testkit.Patience, time.Millisecond)
	dialed(t, ln, 24) // DragonFly reports a maximum of 31
	close(start)
	for range 8 {
		all.Go(func() {
			for range rounds(20) {
				if err := ln.Drain(testkit.Within(t, testkit.Patience)); err != nil && !errors.Is(err, ErrStillOpen) {
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

// A loop that has accepted a connection and does not call Accept again has no connection
// that Close could reset. A drain waits a second for the loop, and counts its connection
// in that time.
func TestDrainOfLoopsThatDoNotReturn(t *testing.T) {
	t.Parallel()
	t.Run("a loop that has ended", func(t *testing.T) {
		ln := drainable(t)
		dialed(t, ln, 2)
		for range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			defer c.Close()
		}
		err := ln.Drain(testkit.Within(t, 100*time.Millisecond))
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 1, de.Accepted)
		require.Zero(t, de.Queued)
		requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
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
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		defer c.Close()
		require.Eventually(t, func() bool { return ln.intake.Gate.Unreturned() == 1 }, testkit.Patience, time.Millisecond)
		requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
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
		requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	})
}

// If the queue cannot be read for a moment, a drain tries again. If ctx ends first, the
// number of queued connections is unknown, not 0, and the error has the cause.
func TestDrainWhileTheQueueCannotBeRead(t *testing.T) {
	cause := errors.New("too many open files")
	l := new(Listener)
	for err, lasts := range map[error]bool{
		nil: false, cause: false,
		l.opError("stats", cause):                  false,
		l.opError("stats", net.ErrClosed):          true,
		l.opError("stats", errors.ErrUnsupported):  true,
		l.opError("stats", sys.ErrNotListening):    true,
		fmt.Errorf("%w", os.ErrDeadlineExceeded):   false,
		fmt.Errorf("no number: %w", net.ErrClosed): true,
	} {
		require.Equal(t, lasts, intake.Lasting(err), "%v", err)
	}
}

// If a filter holds connections back and the system does not report how many, there may be
// some: a drain waits as long as for connections that are reported.
func TestDrainWithAFilterThatTellsNothing(t *testing.T) {
	t.Parallel()
	ln := drainable(t)
	if s, err := ln.Stats(); err != nil || s.Incomplete != unknown {
		t.Skip("this system reports the number")
	}
	ln.intake.Filtered = true
	var de *DrainError
	require.ErrorAs(t, ln.Drain(testkit.Within(t, 200*time.Millisecond)), &de)
	require.Equal(t, unknown, de.HeldBack)
	require.Zero(t, de.Queued)
	requireDrained(t, ln.Drain(testkit.Within(t, testkit.Patience)))
}

// Resume ends a drain in progress on every system, also where new clients are not kept out.
func TestResumeEndsADrain(t *testing.T) {
	ln := drainable(t)
	dialed(t, ln, 1) // nothing accepts it
	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	require.Eventually(t, func() bool {
		ln.intake.Mu.Lock()
		defer ln.intake.Mu.Unlock()
		return ln.intake.Running == 1
	}, testkit.Patience, time.Millisecond)
	require.NoError(t, ln.Resume())
	err := testkit.Received(t, drained)
	require.ErrorIs(t, err, ErrStillOpen)
	require.ErrorContains(t, err, "Resume was called")
}

// A drain of a shared socket tells that it is shared on every system.
func TestDrainOfASharedSocketSaysSo(t *testing.T) {
	inner := drainable(t)
	ln, err := Wrap(inner.TCPListener())
	require.NoError(t, err)
	err = ln.Drain(testkit.Within(t, testkit.Patience))
	require.ErrorIs(t, err, ErrShared)
	require.ErrorIs(t, err, ErrStillOpen)
	testkit.RequireDrainOp(t, err)
}
