//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

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
)

// A filter that cannot be set ends listening, after listen(2), and leaves nothing.
func TestAcceptFilterFaults(t *testing.T) {
	if !hasFilters {
		t.Skipf("%s has no accept filters", runtime.GOOS)
	}
	for _, errno := range []unix.Errno{unix.ENOENT, unix.EINVAL, unix.ENOMEM} {
		before := openDescriptors()
		sys, calls := holding(), 0
		sys.setsockoptString = func(int, int, int, string) error {
			calls++
			return errno
		}
		ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithDeferAccept(time.Second)})
		require.ErrorIs(t, err, errno)
		requireListenError(t, ln, err)
		require.Equal(t, 1, calls)
		require.Equal(t, before, openDescriptors())
	}
}

// holding is a system whose kernel does not ignore filters, by its release.
func holding() system {
	sys := realSystem
	sys.sysctl = func(name string) (uint32, error) {
		if name == releaseKnob {
			return 1302001, nil
		}
		return realSystem.sysctl(name)
	}
	return sys
}

// A kernel that takes filters and ignores them is told by its release, before a
// port is bound.
func TestAcceptFilterIgnored(t *testing.T) {
	if runtime.GOOS != "freebsd" {
		t.Skip("FreeBSD alone has kernels that ignore filters")
	}
	sys := realSystem
	sys.sysctl = func(string) (uint32, error) { return 1400507, nil }
	sys.bind = func(int, unix.Sockaddr) error {
		t.Error("bound")
		return nil
	}
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		before := openDescriptors()
		ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{opt})
		requireListenError(t, ln, err)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, name+": FreeBSD 1400507 (kern.osreldate)")
		require.Equal(t, before, openDescriptors())
	}
}

// The structure that the kernel is given is that of sys/socket.h: a name of 16
// bytes and an argument of 240, each with a NUL at its end.
func TestAcceptFilterArgument(t *testing.T) {
	if !hasFilters {
		t.Skipf("%s has no accept filters", runtime.GOOS)
	}
	for _, row := range []struct {
		opt       Option
		name, arg string
	}{
		{WithAcceptFilter("httpready", ""), "httpready", ""},
		{WithAcceptFilter("a", "with an argument"), "a", "with an argument"},
		{WithDeferAccept(time.Second), "dataready", ""},
	} {
		sys, given := holding(), ""
		sys.setsockoptString = func(_, level, name int, value string) error {
			require.Equal(t, unix.SOL_SOCKET, level)
			require.Equal(t, 0x1000, name)
			given = value
			return nil
		}
		ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{row.opt})
		require.NoError(t, err)
		require.NoError(t, ln.Close())
		require.Len(t, given, 256)
		require.Equal(t, row.name, unix.ByteSliceToString([]byte(given[:16])))
		require.Equal(t, row.arg, unix.ByteSliceToString([]byte(given[16:])))
	}
}

// A buffer past the kernel's largest is an error that names the setting, whether the
// kernel refuses it or cuts it.
func TestBufferIsNotCut(t *testing.T) {
	for _, opt := range []Option{WithReceiveBuffer(math.MaxInt32), WithSendBuffer(math.MaxInt32)} {
		before := openDescriptors()
		ln, err := ListenTCP("127.0.0.1:0", opt)
		requireListenError(t, ln, err)
		require.ErrorContains(t, err, bufferKnob(0))
		require.Equal(t, before, openDescriptors())
	}
}

// Buffers and keep-alive are on the connections, and keep-alive not on the listener.
func TestOptionOnTheSocket(t *testing.T) {
	const size = 150_000 // more than any default, less than any maximum
	read := func(c syscall.Conn, level, name int) (int, error) {
		raw, err := c.SyscallConn()
		require.NoError(t, err)
		return rawInt(raw, func(fd int) (int, error) { return unix.GetsockoptInt(fd, level, name) })
	}
	get := func(c syscall.Conn, level, name int) int {
		v, err := read(c, level, name)
		require.NoError(t, err)
		return v
	}
	idle := net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}
	names, timed := keepAliveNames()
	if timed {
		idle = net.KeepAliveConfig{Enable: true, Idle: 33 * time.Second, Interval: 7 * time.Second, Count: 5}
	}

	plain, plainConn := listenAndAccept(t)
	ln, c := listenAndAccept(t, WithReceiveBuffer(size), WithSendBuffer(size), WithKeepAlive(idle))
	for _, buffer := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		require.Less(t, get(plain, unix.SOL_SOCKET, buffer), size)
		require.GreaterOrEqual(t, get(ln, unix.SOL_SOCKET, buffer), size)
		if runtime.GOOS != "darwin" { // which tunes them by itself, past that
			require.Less(t, get(plainConn, unix.SOL_SOCKET, buffer), size)
		}
		require.GreaterOrEqual(t, get(c, unix.SOL_SOCKET, buffer), size)
	}

	require.NotZero(t, get(plainConn, unix.SOL_SOCKET, unix.SO_KEEPALIVE), "net's default")
	require.Zero(t, get(ln, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	require.NotZero(t, get(c, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	_, c = listenAndAccept(t, WithKeepAlive(net.KeepAliveConfig{}))
	require.Zero(t, get(c, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	if !timed {
		return
	}
	if _, err := read(plain, unix.IPPROTO_TCP, names[0]); err != nil {
		require.ErrorIs(t, err, unix.ENOPROTOOPT)
		t.Logf("%s does not tell the times of keep-alive", runtime.GOOS)
		return
	}
	ln, c = listenAndAccept(t, WithKeepAlive(idle))
	for i, want := range []int{33, 7, 5} {
		require.NotEqual(t, want, get(plainConn, unix.IPPROTO_TCP, names[i]))
		require.NotEqual(t, want, get(ln, unix.IPPROTO_TCP, names[i]))
		require.Equal(t, want, get(c, unix.IPPROTO_TCP, names[i]))
	}
	_, c = listenAndAccept(t, WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}))
	for _, name := range names {
		require.Equal(t, get(plain, unix.IPPROTO_TCP, name), get(c, unix.IPPROTO_TCP, name), "the system's")
	}
}

func listenAndAccept(t *testing.T, opts ...Option) (*Listener, *net.TCPConn) {
	t.Helper()
	ln := listen(t, opts...)
	dial(t, ln.Addr())
	return ln, acceptBy(t, ln, ln.Accept)
}

// filterOf reads the name of the accept filter of ln.
func filterOf(t *testing.T, ln *Listener) (name string) {
	t.Helper()
	var err error
	require.NoError(t, ln.raw.Control(func(fd uintptr) {
		const soAcceptFilter = 0x1000 // SO_ACCEPTFILTER; struct accept_filter_arg begins with the name
		name, err = unix.GetsockoptString(int(fd), unix.SOL_SOCKET, soAcceptFilter)
	}))
	require.NoError(t, err)
	return name
}
