package acceptq

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/testkit"
)

// connectQueued connects a client and waits until n connections are queued: connect(2)
// returns before the kernel has handled the last segment of the handshake.
func connectQueued(t *testing.T, ln *Listener, n int) {
	t.Helper()
	_, err := bsdDial(t, ln)
	require.NoError(t, err, "client %d", n)
	for end := time.Now().Add(testkit.TooLong); queuedNow(t, ln) != n; {
		require.True(t, time.Now().Before(end), "%d queued instead of %d", queuedNow(t, ln), n)
	}
}

// connectHangs requires that a client gets no answer because the queue is full.
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

// queuedNow reads the number of queued connections without the library. It uses kqueue(2),
// because no socket option has the number.
func queuedNow(t *testing.T, ln *Listener) int {
	t.Helper()
	kq, err := unix.Kqueue()
	require.NoError(t, err)
	defer unix.Close(kq)
	var events [1]unix.Kevent_t
	n := testkit.OnDescriptor(t, ln.TCPListener(), func(fd int) (int, error) {
		unix.SetKevent(&events[0], fd, unix.EVFILT_READ, unix.EV_ADD)
		return unix.Kevent(kq, events[:], events[:], &unix.Timespec{})
	})
	if n == 0 {
		return 0
	}
	return int(events[0].Data)
}

// Listening again lengthens the queue at once, and shortens it without losing connections.
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

// bsdDial connects a client to ln until the test ends.
func bsdDial(t *testing.T, ln *Listener) (net.Conn, error) {
	t.Helper()
	client, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.TooLong)
	if err == nil {
		t.Cleanup(func() { client.Close() })
	}
	return client, err
}

// bsdAccept accepts n connections of ln and closes them.
func bsdAccept(t *testing.T, ln *Listener, n int) {
	t.Helper()
	for i := range n {
		require.NoError(t, ln.SetDeadline(time.Now().Add(testkit.TooLong)))
		conn, err := ln.Accept()
		require.NoError(t, err, "connection %d of %d", i+1, n)
		require.NoError(t, conn.Close())
	}
}
