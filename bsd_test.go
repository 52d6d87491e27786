//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"math"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The tests of these systems run by themselves, on a bare kernel: they need
// 127.0.0.1, and no file and no other program.

// tooLong is the time after which a test that waits for the kernel has failed.
const tooLong = 20 * time.Second

func TestBoundsAreReadable(t *testing.T) {
	ceiling, floor, err := realSystem.bounds()
	require.NoError(t, err)
	require.Positive(t, ceiling)
	require.Equal(t, runtime.GOOS == "openbsd", floor > 0, "only OpenBSD has a floor: %d", floor)
}

func TestMeasuredOnFreeBSDOnly(t *testing.T) {
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(100))
	require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
}

// Bounds that cannot be read leave unknown what rests on them, and no more.
func TestBoundsUnreadable(t *testing.T) {
	r, _ := ruleOf(runtime.GOOS)
	sys := realSystem
	sys.sysctl = func(string) (uint32, error) { return 0, unix.EPERM }

	predicted, err := sys.predict(100)
	if r.knob == "" {
		require.NoError(t, err)
		require.Equal(t, 100, predicted.Limit)
		return
	}
	require.ErrorIs(t, err, unix.EPERM)
	require.ErrorContains(t, err, r.knob)
	nothing := Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}
	require.Equal(t, nothing, predicted)

	ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(100)})
	require.NoError(t, err)
	defer ln.Close()
	want := nothing
	if runtime.GOOS == "freebsd" { // whose socket tells
		want = Backlog{Requested: 100, Ceiling: unknown, Limit: 100, Effective: 150, Capacity: 151, Measured: true}
	}
	require.Equal(t, want, ln.Backlog())

	_, err = sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(math.MaxInt32), WithStrictBacklog()})
	require.Error(t, err, "strict, and what was granted is too little or unknown")
}

func TestCeilingByItsFormerName(t *testing.T) {
	r, _ := ruleOf(runtime.GOOS)
	if r.formerKnob == "" {
		t.Skip("the ceiling had no other name here")
	}
	sys := realSystem
	sys.sysctl = func(name string) (uint32, error) {
		if name == r.knob {
			return 0, unix.ENOENT
		}
		return realSystem.sysctl(name)
	}
	ceiling, _, err := sys.bounds()
	require.NoError(t, err)
	same, _, err := realSystem.bounds()
	require.NoError(t, err)
	require.Equal(t, same, ceiling)
}

// bsdListen listens until the test ends.
func bsdListen(t *testing.T, addr string, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP(addr, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// bsdDial connects a client to ln until the test ends.
func bsdDial(t *testing.T, ln *Listener) (net.Conn, error) {
	t.Helper()
	client, err := net.DialTimeout("tcp", ln.Addr().String(), tooLong)
	if err == nil {
		t.Cleanup(func() { client.Close() })
	}
	return client, err
}

// bsdAccept takes n connections off the queue of ln, and closes them.
func bsdAccept(t *testing.T, ln *Listener, n int) {
	t.Helper()
	for i := range n {
		require.NoError(t, ln.SetDeadline(time.Now().Add(tooLong)))
		conn, err := ln.Accept()
		require.NoError(t, err, "connection %d of %d", i+1, n)
		require.NoError(t, conn.Close())
	}
}

// listenAgain asks for a queue of n connections on the live socket of ln.
func listenAgain(t *testing.T, ln *Listener, n int) Backlog {
	t.Helper()
	account, err := ln.SetBacklog(n)
	require.NoError(t, err)
	return account
}
