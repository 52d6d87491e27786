//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package e2e

import (
	"errors"
	"math"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// A buffer above the maximum of the kernel is an error that names the setting, whether
// the kernel refuses or clamps it.
func TestBufferIsNotClamped(t *testing.T) {
	for _, opt := range []acceptq.Option{acceptq.WithReceiveBuffer(math.MaxInt32), acceptq.WithSendBuffer(math.MaxInt32)} {
		before := testkit.OpenDescriptors()
		ln, err := acceptq.ListenTCP("127.0.0.1:0", opt)
		requireListenError(t, ln, err)
		require.ErrorContains(t, err, sockopt.BufferKnob(&sys.Real, 0, math.MaxInt32))
		require.NotContains(t, err.Error(), sockopt.Sbsize, "the setting of the kernel is the smaller bound")
		require.Equal(t, before, testkit.OpenDescriptors())
	}
}

// A buffer below the maximum of the kernel can exceed RLIMIT_SBSIZE. The error names that.
func TestBufferAboveTheLimitOfTheUser(t *testing.T) {
	if runtime.GOOS != "freebsd" && runtime.GOOS != "netbsd" && runtime.GOOS != "dragonfly" {
		t.Skip("there is no RLIMIT_SBSIZE here")
	}
	const rlimitSbsize = 9 // RLIMIT_SBSIZE, sys/resource.h
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(rlimitSbsize, &limit))
	lower := limit
	lower.Cur = 100_000
	require.NoError(t, unix.Setrlimit(rlimitSbsize, &lower))
	defer unix.Setrlimit(rlimitSbsize, &limit)
	before := testkit.OpenDescriptors()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReceiveBuffer(150_000))
	requireListenError(t, ln, err)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, sockopt.Sbsize)
	require.Equal(t, before, testkit.OpenDescriptors())
}

// Connections have the buffers and keep-alive. The listener has no keep-alive.
func TestOptionOnTheSocket(t *testing.T) {
	const size = 150_000 // more than any default, less than any maximum
	read := func(c syscall.Conn, level, name int) (int, error) {
		raw, err := c.SyscallConn()
		require.NoError(t, err)
		return endpoint.RawInt(raw, func(fd int) (int, error) { return unix.GetsockoptInt(fd, level, name) })
	}
	get := func(c syscall.Conn, level, name int) int {
		v, err := read(c, level, name)
		require.NoError(t, err)
		return v
	}
	idle := net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}
	names, timed := sockopt.KeepAliveNames()
	if timed {
		idle = net.KeepAliveConfig{Enable: true, Idle: 33 * time.Second, Interval: 7 * time.Second, Count: 5}
	}

	plain, plainConn := listenAndAccept(t)
	ln, c := listenAndAccept(t, acceptq.WithReceiveBuffer(size), acceptq.WithSendBuffer(size), acceptq.WithKeepAlive(idle))
	for _, buffer := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		require.Less(t, get(plain, unix.SOL_SOCKET, buffer), size)
		require.GreaterOrEqual(t, get(ln, unix.SOL_SOCKET, buffer), size)
		if runtime.GOOS != "darwin" { // macOS adjusts larger buffers itself
			require.Less(t, get(plainConn, unix.SOL_SOCKET, buffer), size)
		}
		require.GreaterOrEqual(t, get(c, unix.SOL_SOCKET, buffer), size)
	}

	require.NotZero(t, get(plainConn, unix.SOL_SOCKET, unix.SO_KEEPALIVE), "net's default")
	require.Zero(t, get(ln, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	require.NotZero(t, get(c, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	_, c = listenAndAccept(t, acceptq.WithKeepAlive(net.KeepAliveConfig{}))
	require.Zero(t, get(c, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	if !timed {
		return
	}
	if _, err := read(plain, unix.IPPROTO_TCP, names[0]); err != nil {
		require.ErrorIs(t, err, unix.ENOPROTOOPT)
		t.Logf("%s does not report the times of keep-alive", runtime.GOOS)
		return
	}
	ln, c = listenAndAccept(t, acceptq.WithKeepAlive(idle))
	for i, want := range []int{33, 7, 5} {
		require.NotEqual(t, want, get(plainConn, unix.IPPROTO_TCP, names[i]))
		require.NotEqual(t, want, get(ln, unix.IPPROTO_TCP, names[i]))
		require.Equal(t, want, get(c, unix.IPPROTO_TCP, names[i]))
	}
	_, c = listenAndAccept(t, acceptq.WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}))
	for _, name := range names {
		require.Equal(t, get(plain, unix.IPPROTO_TCP, name), get(c, unix.IPPROTO_TCP, name), "the system's")
	}
}

func listenAndAccept(t *testing.T, opts ...acceptq.Option) (*acceptq.Listener, *net.TCPConn) {
	t.Helper()
	ln := listen(t, opts...)
	testkit.Dial(t, ln.Addr())
	return ln, testkit.AcceptBy(t, ln, ln.Accept)
}

// requireListenError checks the form of the error of a failed Listen.
func requireListenError(t *testing.T, ln *acceptq.Listener, err error) {
	t.Helper()
	require.Nil(t, ln)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	require.Equal(t, "tcp", op.Net)
}
