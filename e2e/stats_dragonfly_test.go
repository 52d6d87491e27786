package e2e

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
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
	ln := listen(t, acceptq.WithBacklog(backlog))
	for range most - 1 {
		testkit.Dial(t, ln.Addr())
	}
	queuedBecomes(t, most-1, ln.Stats)
	for range 3 {
		testkit.Dial(t, ln.Addr())
		s := queuedBecomes(t, sys.Unknown, ln.Stats)
		require.Equal(t, backlog, s.Limit)
		_, known := s.Utilization()
		require.False(t, known)
	}
	for range 3 {
		testkit.AcceptBy(t, ln, ln.Accept)
	}
	queuedBecomes(t, most-1, ln.Stats)
}
