//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A bound that cannot be read leaves unknown what rests on it, and listening
// works all the same.
func TestBoundThatCannotBeReadIsUnknown(t *testing.T) {
	r, _ := ruleOf(runtime.GOOS)
	for _, name := range []string{r.knob, r.floor} {
		if name == "" {
			continue // compiled in, or there is none
		}
		for _, errno := range []unix.Errno{unix.ENOENT, unix.EPERM, unix.EINVAL} {
			t.Run(name+"/"+unix.ErrnoName(errno), func(t *testing.T) {
				sys := realSystem
				sys.sysctl = func(asked string) (uint32, error) {
					if asked == name || asked == r.formerKnob {
						return 0, errno
					}
					return realSystem.sysctl(asked)
				}
				b, err := sys.predict(1)
				require.ErrorIs(t, err, errno)
				require.Equal(t, -1, b.Limit)

				ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
				require.NoError(t, err)
				defer ln.Close()
				want := -1
				if runtime.GOOS == "freebsd" {
					want = 1 // the socket tells
				}
				require.Equal(t, want, ln.Backlog().Limit)
				require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
			})
		}
	}
}

// What a socket does not tell is worked out by the rule, and said to be.
func TestLimitThatCannotBeReadIsByTheRule(t *testing.T) {
	for name, answer := range map[string]struct {
		n   int
		err error
	}{
		"ENOPROTOOPT": {0, unix.ENOPROTOOPT},
		"EPERM":       {0, unix.EPERM},
		"negative":    {-1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			sys := realSystem
			sys.getsockoptInt = func(int, int, int) (int, error) { return answer.n, answer.err }
			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			want, err := sys.predict(1)
			require.NoError(t, err)
			require.Equal(t, want, ln.Backlog())
		})
	}
}
