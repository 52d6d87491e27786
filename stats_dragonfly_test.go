package acceptq

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// kqueue(2) reports a maximum of kern.ipc.soavailconn connections. From that number on the
// length is unknown. It is known again once Accept has returned some.
func TestQueuedPastTheBoundIsUnknown(t *testing.T) {
	const backlog = 100
	bound, err := unix.SysctlUint32("kern.ipc.soavailconn")
	if errors.Is(err, unix.ENOENT) {
		t.Skip("this kernel has no kern.ipc.soavailconn, and reports every length")
	}
	require.NoError(t, err)
	most := int(int32(bound))
	if most < 2 || most > backlog {
		t.Skipf("kern.ipc.soavailconn is %d: sysctl kern.ipc.soavailconn=32", most)
	}
	ln := listen(t, WithBacklog(backlog))
	for range most - 1 {
		dial(t, ln.Addr())
	}
	queuedBecomes(t, most-1, ln.Stats)
	for range 3 {
		dial(t, ln.Addr())
		s := queuedBecomes(t, unknown, ln.Stats)
		require.Equal(t, backlog, s.Limit)
		_, known := s.Utilization()
		require.False(t, known)
	}
	for range 3 {
		acceptBy(t, ln, ln.Accept)
	}
	queuedBecomes(t, most-1, ln.Stats)
}

// If the bound cannot be read, every length except 0 is unknown, unless the kernel has
// no such sysctl.
func TestBoundOfTheLengthUnreadable(t *testing.T) {
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
		k := realKernel
		k.readable = func(int) (int, error) { return row.n, nil }
		k.sysctl = func(string) (uint32, error) { return 5, row.errs }
		n, err := k.queueLength(-1)
		require.NoError(t, err, name)
		require.Equal(t, row.want, n, name)
	}
}
