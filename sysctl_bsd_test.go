//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"math"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestBoundsAreReadable(t *testing.T) {
	ceiling, floor, err := realKernel.bounds()
	require.NoError(t, err)
	require.Positive(t, ceiling)
	require.Equal(t, runtime.GOOS == "openbsd", floor > 0, "only OpenBSD has a floor: %d", floor)
}

// If a bound cannot be read, only the numbers that depend on it are unknown.
func TestBoundsUnreadable(t *testing.T) {
	r := hostRule()
	k := realKernel
	k.sysctl = func(string) (uint32, error) { return 0, unix.EPERM }

	predicted, err := k.predict(100)
	if r.knob == "" {
		require.NoError(t, err)
		require.Equal(t, 100, predicted.Limit)
		return
	}
	require.ErrorIs(t, err, unix.EPERM)
	require.ErrorContains(t, err, r.knob)
	nothing := Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}
	require.Equal(t, nothing, predicted)

	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(100)})
	require.NoError(t, err)
	defer ln.Close()
	want := nothing
	if runtime.GOOS == "freebsd" { // where the socket reports the limit
		want = Backlog{Requested: 100, Ceiling: unknown, Limit: 100, Effective: 150, Capacity: 151, Measured: true}
	}
	require.Equal(t, want, ln.Backlog())

	_, err = k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(math.MaxInt32), WithStrictBacklog()})
	require.Error(t, err, "WithStrictBacklog must fail if the limit is too small or unknown")
}

func TestCeilingByItsFormerName(t *testing.T) {
	r := hostRule()
	if r.formerKnob == "" {
		t.Skip("the ceiling had no other name here")
	}
	k := realKernel
	k.sysctl = func(name string) (uint32, error) {
		if name == r.knob {
			return 0, unix.ENOENT
		}
		return realKernel.sysctl(name)
	}
	ceiling, _, err := k.bounds()
	require.NoError(t, err)
	same, _, err := realKernel.bounds()
	require.NoError(t, err)
	require.Equal(t, same, ceiling)
}

// Nothing is predicted from a negative ceiling, and it is not reported as a large one.
func TestNegativeCeilingIsUnknown(t *testing.T) {
	r := hostRule()
	if r.knob == "" {
		t.Skip("the ceiling is compiled in")
	}
	k := realKernel
	k.sysctl = func(string) (uint32, error) { return math.MaxUint32, nil }
	b, err := k.predict(100)
	require.ErrorIs(t, err, errNegative)
	require.ErrorContains(t, err, r.knob)
	require.Equal(t, unknown, b.Limit)
	require.Equal(t, unknown, b.Ceiling)
}
