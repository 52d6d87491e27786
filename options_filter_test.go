//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// If a filter cannot be set, which happens after listen(2), listening fails and leaves
// nothing behind.
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

// holding returns a system whose release does not ignore filters.
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

// The library recognizes a kernel that accepts filters and ignores them by its release.
// It returns an error before it binds a port.
func TestAcceptFilterIgnored(t *testing.T) {
	if runtime.GOOS != "freebsd" {
		t.Skip("only FreeBSD has kernels that ignore filters")
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

// The structure for the kernel is that of sys/socket.h: a name of 16 bytes and an
// argument of 240 bytes, each with a NUL at its end.
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
	require.NoError(t, ln.intake.raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.SOL_SOCKET, soAcceptFilter) // struct accept_filter_arg begins with the name
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

// listenFiltered listens with the filter dataready. If its module is not loaded, it
// skips the test and names the command that loads it.
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

// With a filter a silent client does not enter the accept queue, but a client that
// sends data does. Only FreeBSD reports the number of held-back connections.
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
			require.Equal(t, speaker.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr(), "the client that sends data is accepted first")
			if tells {
				require.Equal(t, 1, incomplete(t, ln))
			}
			require.Zero(t, queued(t, ln))

			_, err = ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, "dataready", filterOf(t, ln), "listening again must keep the filter")
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

// A drain waits for connections that a filter holds back, also where the system does not
// report their number: clients that connected before the drain are served.
func TestDrainServesHeldBackConnections(t *testing.T) {
	ln := listenFiltered(t, WithAcceptFilter("dataready", ""))
	const clients = 5
	var silent []*net.TCPConn
	for range clients {
		silent = append(silent, dial(t, ln.Addr()))
	}
	accepted := make(chan net.Conn, clients)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	drained := inBackground(t, ln, within(t, patience))
	for _, c := range silent {
		_, err := c.Write([]byte("x"))
		require.NoError(t, err)
	}
	requireDrained(t, received(t, drained))
	require.NoError(t, ln.Close())
	<-done
	require.Len(t, accepted, clients)
	for range clients {
		require.NoError(t, (<-accepted).Close())
	}
}
