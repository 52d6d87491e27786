package acceptq

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

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
		k := sys.Real
		k.Readable = func(int) (int, error) { return row.n, nil }
		k.Sysctl = func(string) (uint32, error) { return 5, row.errs }
		n, err := queueLength(&k, -1)
		require.NoError(t, err, name)
		require.Equal(t, row.want, n, name)
	}
}
