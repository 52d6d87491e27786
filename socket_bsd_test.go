//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// If a bound cannot be read, the numbers that depend on it are unknown. Listening still
// works.
func TestUnreadableBoundIsUnknown(t *testing.T) {
	r := hostRule()
	for _, name := range []string{r.knob, r.floor} {
		if name == "" {
			continue // compiled in, or absent
		}
		for _, errno := range []unix.Errno{unix.ENOENT, unix.EPERM, unix.EINVAL} {
			t.Run(name+"/"+unix.ErrnoName(errno), func(t *testing.T) {
				k := sys.Real
				k.Sysctl = func(asked string) (uint32, error) {
					if asked == name || asked == r.formerKnob {
						return 0, errno
					}
					return sys.Real.Sysctl(asked)
				}
				b, err := predict(&k, 1)
				require.ErrorIs(t, err, errno)
				require.Equal(t, -1, b.Limit)

				ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
				require.NoError(t, err)
				defer ln.Close()
				want := -1
				if runtime.GOOS == "freebsd" {
					want = 1 // the socket reports the limit
				}
				require.Equal(t, want, ln.Backlog().Limit)
				require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
			})
		}
	}
}

// If a socket does not report its limit, the library computes it by the rule and sets
// Measured to false.
func TestUnreadableLimitFollowsTheRule(t *testing.T) {
	for name, answer := range map[string]struct {
		n   int
		err error
	}{
		"ENOPROTOOPT": {0, unix.ENOPROTOOPT},
		"EPERM":       {0, unix.EPERM},
		"negative":    {-1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			k.GetsockoptInt = func(int, int, int) (int, error) { return answer.n, answer.err }
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			want, err := predict(&k, 1)
			require.NoError(t, err)
			require.Equal(t, want, ln.Backlog())
		})
	}
}

// optional reports whether listening and Wrap succeed without the option.
func optional(level, name int) bool {
	return level == unix.SOL_SOCKET &&
		(name == soListenQueueLimit || name == unix.SO_ACCEPTCONN && runtime.GOOS == "dragonfly")
}

// statsCalls are the calls that Stats cannot do without.
var statsCalls = []string{"getsockopt", "getsockopt, if it tells", "kevent"}

// willing returns a kernel that accepts every option, even if it does not spread
// connections.
func willing() sys.Calls {
	k := sys.Real
	k.Sysctl = func(name string) (uint32, error) {
		switch name {
		case "net.inet.tcp.fastopen.server_enable", sockopt.GroupKnob:
			return 1, nil
		case "security.jail.jailed", "jail.jailed":
			return 0, nil
		}
		return sys.RealOwnCalls.Sysctl(name)
	}
	if runtime.GOOS != "freebsd" {
		return k
	}
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_TCP {
			return nil // TCP_FASTOPEN, which the kernel may lack
		}
		return sys.Real.SetsockoptInt(fd, level, name, value)
	}
	return k
}

func kernelOptions() (opts []Option) {
	opts = []Option{WithBacklog(20)}
	if runtime.GOOS != "openbsd" {
		opts = append(opts, WithKeepAlive(net.KeepAliveConfig{Enable: true}))
	}
	if runtime.GOOS == "freebsd" {
		opts = append(opts, WithFastOpen(3))
	}
	return opts
}

func kernelAnswers(all map[string][]answer) {
	all["sysctl"] = append(refusals(unix.EFAULT, unix.EINVAL, unix.EISDIR, unix.ENOENT, unix.ENOMEM, unix.EPERM),
		numbers(0, 1, -1)...)
	for _, errno := range []unix.Errno{unix.EACCES, unix.EBADF, unix.EINTR, unix.ENOENT, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		all["kevent"] = append(all["kevent"], answer{err: os.NewSyscallError("kevent", errno)})
	}
}

func (m *meddler) ownCalls(k *sys.Calls, base sys.Calls, meddle func() answer) {
	k.Sysctl = func(name string) (uint32, error) {
		if m.turn("sysctl") {
			return uint32(meddle().n), meddle().err
		}
		return base.Sysctl(name)
	}
	k.Readable = func(fd int) (int, error) {
		if m.turn("kevent") {
			return unknown, meddle().err
		}
		return base.Readable(fd)
	}
	k.SetsockoptString = func(fd, level, name int, value string) error {
		if m.turn("setsockopt") {
			return meddle().err
		}
		return base.SetsockoptString(fd, level, name, value)
	}
}

func kernelActs() []act { return nil }

// bsdListen listens until the test ends.
func bsdListen(t *testing.T, addr string, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP(addr, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// listenAgain calls listen(2) with a backlog of n on the live socket of ln.
func listenAgain(t *testing.T, ln *Listener, n int) Backlog {
	t.Helper()
	account, err := ln.SetBacklog(n)
	require.NoError(t, err)
	return account
}

// If a filter cannot be set, which happens after listen(2), listening fails and leaves
// nothing behind.
func TestAcceptFilterFaults(t *testing.T) {
	if !sockopt.HasFilters {
		t.Skipf("%s has no accept filters", runtime.GOOS)
	}
	for _, errno := range []unix.Errno{unix.ENOENT, unix.EINVAL, unix.ENOMEM} {
		before := testkit.OpenDescriptors()
		k, calls := holding(), 0
		k.SetsockoptString = func(int, int, int, string) error {
			calls++
			return errno
		}
		ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithDeferAccept(time.Second)})
		require.ErrorIs(t, err, errno)
		requireListenError(t, ln, err)
		require.Equal(t, 1, calls)
		require.Equal(t, before, testkit.OpenDescriptors())
	}
}

// holding returns a system whose release does not ignore filters.
func holding() sys.Calls {
	k := sys.Real
	k.Sysctl = func(name string) (uint32, error) {
		if name == sockopt.ReleaseKnob {
			return 1302001, nil
		}
		return sys.Real.Sysctl(name)
	}
	return k
}

// The library recognizes a kernel that accepts filters and ignores them by its release.
// It returns an error before it binds a port.
func TestAcceptFilterIgnored(t *testing.T) {
	if runtime.GOOS != "freebsd" {
		t.Skip("only FreeBSD has kernels that ignore filters")
	}
	k := sys.Real
	k.Sysctl = func(string) (uint32, error) { return 1400507, nil }
	k.Bind = func(int, unix.Sockaddr) error {
		t.Error("bound")
		return nil
	}
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		before := testkit.OpenDescriptors()
		ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{opt})
		requireListenError(t, ln, err)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, name+": FreeBSD 1400507 (kern.osreldate)")
		require.Equal(t, before, testkit.OpenDescriptors())
	}
}

// The structure for the kernel is that of sys/socket.h: a name of 16 bytes and an
// argument of 240 bytes, each with a NUL at its end.
func TestAcceptFilterArgument(t *testing.T) {
	if !sockopt.HasFilters {
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
		k.SetsockoptString = func(_, level, name int, value string) error {
			require.Equal(t, unix.SOL_SOCKET, level)
			require.Equal(t, 0x1000, name)
			given = value
			return nil
		}
		ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{row.opt})
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
	require.NoError(t, ln.intake.Raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.SOL_SOCKET, sockopt.SoAcceptFilter) // struct accept_filter_arg begins with the name
	}))
	require.NoError(t, err)
	return name
}

// needFilters skips a test on a kernel that has no filters, or ignores them.
func needFilters(t *testing.T) {
	t.Helper()
	if err := sockopt.MustFilter(&sys.Real); err != nil {
		t.Skip("see TestFiltersWithoutEffectAreAnError:", err)
	}
}

// listenFiltered listens with the filter dataready. If its module is not loaded, it
// skips the test and names the command that loads it.
func listenFiltered(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	needFilters(t)
	before := testkit.OpenDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	if errors.Is(err, unix.ENOENT) {
		requireListenError(t, ln, err)
		load := map[string]string{
			"freebsd":   "kldload accf_data",
			"dragonfly": "kldload accf_data",
			"netbsd":    "modload accf_dataready",
		}[runtime.GOOS]
		require.ErrorContains(t, err, load)
		require.Equal(t, before, testkit.OpenDescriptors())
		t.Skip("this kernel has no filter dataready: " + load)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
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

			silent := testkit.Dial(t, ln.Addr())
			require.True(t, testkit.Eventually(func() bool { return !tells || incomplete(t, ln) == 1 }))
			speaker := testkit.Dial(t, ln.Addr())
			_, err := speaker.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, speaker.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr(), "the client that sends data is accepted first")
			if tells {
				require.Equal(t, 1, incomplete(t, ln))
			}
			require.Zero(t, queued(t, ln))

			_, err = ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, "dataready", filterOf(t, ln), "listening again must keep the filter")
			_, err = silent.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, silent.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr())
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

func TestBoundsAreReadable(t *testing.T) {
	ceiling, floor, err := readBounds(&sys.Real)
	require.NoError(t, err)
	require.Positive(t, ceiling)
	require.Equal(t, runtime.GOOS == "openbsd", floor > 0, "only OpenBSD has a floor: %d", floor)
}

// If a bound cannot be read, only the numbers that depend on it are unknown.
func TestBoundsUnreadable(t *testing.T) {
	r := hostRule()
	k := sys.Real
	k.Sysctl = func(string) (uint32, error) { return 0, unix.EPERM }

	predicted, err := predict(&k, 100)
	if r.knob == "" {
		require.NoError(t, err)
		require.Equal(t, 100, predicted.Limit)
		return
	}
	require.ErrorIs(t, err, unix.EPERM)
	require.ErrorContains(t, err, r.knob)
	nothing := Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}
	require.Equal(t, nothing, predicted)

	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(100)})
	require.NoError(t, err)
	defer ln.Close()
	want := nothing
	if runtime.GOOS == "freebsd" { // where the socket reports the limit
		want = Backlog{Requested: 100, Ceiling: unknown, Limit: 100, Effective: 150, Capacity: 151, Measured: true}
	}
	require.Equal(t, want, ln.Backlog())

	_, err = listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(math.MaxInt32), WithStrictBacklog()})
	require.Error(t, err, "WithStrictBacklog must fail if the limit is too small or unknown")
}

func TestCeilingByItsFormerName(t *testing.T) {
	r := hostRule()
	if r.formerKnob == "" {
		t.Skip("the ceiling had no other name here")
	}
	k := sys.Real
	k.Sysctl = func(name string) (uint32, error) {
		if name == r.knob {
			return 0, unix.ENOENT
		}
		return sys.Real.Sysctl(name)
	}
	ceiling, _, err := readBounds(&k)
	require.NoError(t, err)
	same, _, err := readBounds(&sys.Real)
	require.NoError(t, err)
	require.Equal(t, same, ceiling)
}

// Nothing is predicted from a negative ceiling, and it is not reported as a large one.
func TestNegativeCeilingIsUnknown(t *testing.T) {
	r := hostRule()
	if r.knob == "" {
		t.Skip("the ceiling is compiled in")
	}
	k := sys.Real
	k.Sysctl = func(string) (uint32, error) { return math.MaxUint32, nil }
	b, err := predict(&k, 100)
	require.ErrorIs(t, err, errNegative)
	require.ErrorContains(t, err, r.knob)
	require.Equal(t, unknown, b.Limit)
	require.Equal(t, unknown, b.Ceiling)
}

// A process without a descriptor cannot open the kqueue that Stats needs. A drain tries
// again until ctx ends, and does not report an unread queue as empty.
func TestDrainWithoutADescriptor(t *testing.T) {
	if runtime.GOOS == "freebsd" {
		t.Skip("Stats needs no descriptor on FreeBSD")
	}
	var full atomic.Bool
	k := sys.Real
	k.Readable = func(fd int) (int, error) {
		if full.Load() {
			return unknown, os.NewSyscallError("kqueue", unix.EMFILE)
		}
		return sys.Real.Readable(fd)
	}
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", nil)
	require.NoError(t, err)
	defer ln.Close()
	dialed(t, ln, 3)

	full.Store(true)
	err = ln.Drain(testkit.Within(t, 100*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, unknown, de.Queued)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, err, unix.EMFILE)
	require.False(t, errors.Is(err, ErrStillOpen))

	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	require.Never(t, func() bool { return len(drained) > 0 }, 50*time.Millisecond, time.Millisecond)
	full.Store(false)
	for range 3 {
		c, err := ln.Accept()
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()
	requireDrained(t, testkit.Received(t, drained))
}

// If the bound cannot be read, every length except 0 is unknown, unless the kernel has
// no such sysctl.
func TestBoundOfTheLengthUnreadable(t *testing.T) {
	if runtime.GOOS != "dragonfly" {
		t.Skip("only DragonFly bounds the length")
	}
	for name, row := range map[string]struct {
		n    int
		errs error
		want int
	}{
		"no such name":        {5, unix.ENOENT, 5},
		"not allowed":         {5, unix.EPERM, unknown},
		"an empty queue":      {0, unix.EPERM, 0},
		"the bound is not 32": {5, nil, unknown},
	} {
		k := sys.Real
		k.Readable = func(int) (int, error) { return row.n, nil }
		k.Sysctl = func(string) (uint32, error) { return 5, row.errs }
		n, err := queueLength(&k, -1)
		require.NoError(t, err, name)
		require.Equal(t, row.want, n, name)
	}
}
