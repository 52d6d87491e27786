//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"runtime"
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
		k, calls := holding(), 0
		k.setsockoptString = func(int, int, int, string) error {
			calls++
			return errno
		}
		ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithDeferAccept(time.Second)})
		require.ErrorIs(t, err, errno)
		requireListenError(t, ln, err)
		require.Equal(t, 1, calls)
		require.Equal(t, before, openDescriptors())
	}
}

// holding is a system whose kernel does not ignore filters, by its release.
func holding() kernel {
	k := realKernel
	k.sysctl = func(name string) (uint32, error) {
		if name == releaseKnob {
			return 1302001, nil
		}
		return realKernel.sysctl(name)
	}
	return k
}

// A kernel that takes filters and ignores them is told by its release, before a
// port is bound.
func TestAcceptFilterIgnored(t *testing.T) {
	if runtime.GOOS != "freebsd" {
		t.Skip("FreeBSD alone has kernels that ignore filters")
	}
	k := realKernel
	k.sysctl = func(string) (uint32, error) { return 1400507, nil }
	k.bind = func(int, unix.Sockaddr) error {
		t.Error("bound")
		return nil
	}
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		before := openDescriptors()
		ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{opt})
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
		k, given := holding(), ""
		k.setsockoptString = func(_, level, name int, value string) error {
			require.Equal(t, unix.SOL_SOCKET, level)
			require.Equal(t, 0x1000, name)
			given = value
			return nil
		}
		ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{row.opt})
		require.NoError(t, err)
		require.NoError(t, ln.Close())
		require.Len(t, given, 256)
		require.Equal(t, row.name, unix.ByteSliceToString([]byte(given[:16])))
		require.Equal(t, row.arg, unix.ByteSliceToString([]byte(given[16:])))
	}
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

// needFilters skips a test on a kernel that has no filters, or ignores them.
func needFilters(t *testing.T) {
	t.Helper()
	if err := realKernel.mustFilter(); err != nil {
		t.Skip("see TestFiltersWithoutEffectAreAnError:", err)
	}
}

// listenFiltered listens with dataready, or skips: its module may be absent, which is
// said, with the command that loads it.
func listenFiltered(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	needFilters(t)
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	if errors.Is(err, unix.ENOENT) {
		requireListenError(t, ln, err)
		load := map[string]string{
			"freebsd":   "kldload accf_data",
			"dragonfly": "kldload accf_data",
			"netbsd":    "modload accf_dataready",
		}[runtime.GOOS]
		require.ErrorContains(t, err, load)
		require.Equal(t, before, openDescriptors())
		t.Skip("this kernel has no filter dataready: " + load)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestAcceptFilterUnknown(t *testing.T) {
	needFilters(t)
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", WithAcceptFilter("nosuchfilter", ""))
	require.ErrorIs(t, err, unix.ENOENT)
	require.ErrorContains(t, err, `"nosuchfilter": no such filter is loaded`)
	requireListenError(t, ln, err)
	require.Equal(t, before, openDescriptors())
}

// A silent client waits outside of the queue, beside one that speaks. FreeBSD alone
// tells how many do.
func TestAcceptFilterActs(t *testing.T) {
	tells := runtime.GOOS == "freebsd"
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		t.Run(name, func(t *testing.T) {
			ln := listenFiltered(t, WithBacklog(5), opt)
			require.Equal(t, "dataready", filterOf(t, ln))

			silent := dial(t, ln.Addr())
			require.True(t, eventually(func() bool { return !tells || incomplete(t, ln) == 1 }))
			speaker := dial(t, ln.Addr())
			_, err := speaker.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, speaker.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr(), "who speaks is accepted first")
			if tells {
				require.Equal(t, 1, incomplete(t, ln))
			}
			require.Zero(t, queued(t, ln))

			_, err = ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, "dataready", filterOf(t, ln), "listening again keeps it")
			_, err = silent.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, silent.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr())
			if tells {
				require.Zero(t, incomplete(t, ln))
			}
		})
	}
}

func incomplete(t *testing.T, ln *Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Incomplete
}

func queued(t *testing.T, ln *Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Queued
}
