package acceptq

import (
	"fmt"
	"math"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The ceiling is compiled in, and a negative number, which the kernel takes for
// 0, is not passed on.
func TestAccountByTheRule(t *testing.T) {
	for _, tt := range []struct{ n, limit int }{
		{math.MinInt, 128}, {-1, 128}, {0, 0}, {1, 1}, {5, 5}, {127, 127}, {128, 128},
		{129, 128}, {1000, 128}, {32768, 128}, {65541, 128}, {math.MaxInt32, 128}, {math.MaxInt, 128},
	} {
		ln := bsdListen(t, "127.0.0.1:0", WithBacklog(tt.n))
		require.Equal(t, Backlog{
			Requested: max(tt.n, -1), Ceiling: 128, Limit: tt.limit,
			Effective: tt.limit, Capacity: tt.limit + 1,
		}, ln.Backlog(), "listen(%d)", tt.n)
	}
}

func TestStrictNamesNoKnob(t *testing.T) {
	_, err := ListenTCP("127.0.0.1:0", WithBacklog(129), WithStrictBacklog())
	var clamp *ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, &ClampError{Requested: 129, Limit: 128, Ceiling: 128}, clamp)
}

// Clients that come one at a time fill the queue up to the capacity. The SYN of
// the next is dropped, and it hangs.
func TestWhatReallyFits(t *testing.T) {
	for _, tt := range []struct{ n, held int }{
		{0, 1}, {1, 2}, {2, 3}, {5, 6}, {10, 11}, {128, 129}, {1000, 129}, {-1, 129},
	} {
		if testing.Short() && tt.held > 6 {
			continue
		}
		t.Run(fmt.Sprintf("listen(%d)", tt.n), func(t *testing.T) {
			ln := bsdListen(t, "127.0.0.1:0", WithBacklog(tt.n))
			require.Equal(t, tt.held, ln.Backlog().Capacity)

			for i := range tt.held {
				connectQueued(t, ln, i+1)
			}
			connectHangs(t, ln)
			require.Equal(t, tt.held, queuedNow(t, ln))
			bsdAccept(t, ln, tt.held)
			require.Zero(t, queuedNow(t, ln), "more than the capacity survived")
		})
	}
}

// Listening again grows the queue at once, and shrinks it without loss.
func TestListenAgain(t *testing.T) {
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(1))
	connectQueued(t, ln, 1)
	connectQueued(t, ln, 2)
	require.Equal(t, 6, listenAgain(t, ln, 5).Capacity)
	for queued := 3; queued <= 6; queued++ {
		connectQueued(t, ln, queued)
	}
	require.Equal(t, 3, listenAgain(t, ln, 2).Capacity)
	require.Equal(t, 6, queuedNow(t, ln))
	connectHangs(t, ln)
	bsdAccept(t, ln, 6)
}

// connectQueued connects the client that makes n in the queue, and waits until
// it does: connect(2) returns before the last segment of the handshake is seen.
func connectQueued(t *testing.T, ln *Listener, n int) {
	t.Helper()
	_, err := bsdDial(t, ln)
	require.NoError(t, err, "client %d", n)
	for end := time.Now().Add(tooLong); queuedNow(t, ln) != n; {
		require.True(t, time.Now().Before(end), "%d queued instead of %d", queuedNow(t, ln), n)
	}
}

// connectHangs gives up on a client that a full queue leaves without an answer.
func connectHangs(t *testing.T, ln *Listener) {
	t.Helper()
	client, err := net.DialTimeout("tcp", ln.Addr().String(), 300*time.Millisecond)
	if err == nil {
		client.Close()
	}
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), "%v", err)
}

// queuedNow asks the kernel how many connections wait, past the library: no
// socket option tells, but kqueue(2) does.
func queuedNow(t *testing.T, ln *Listener) int {
	t.Helper()
	kq, err := unix.Kqueue()
	require.NoError(t, err)
	defer unix.Close(kq)
	var events [1]unix.Kevent_t
	n := onDescriptor(t, ln.TCPListener(), func(fd int) (int, error) {
		unix.SetKevent(&events[0], fd, unix.EVFILT_READ, unix.EV_ADD)
		return unix.Kevent(kq, events[:], events[:], &unix.Timespec{})
	})
	if n == 0 {
		return 0
	}
	return int(events[0].Data)
}
