package acceptq

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// unreadable are kernels whose sockets do not tell their limit.
var unreadable = map[string]func(sys *system){
	"EPERM":         answers(0, unix.EPERM),
	"ENOPROTOOPT":   answers(0, unix.ENOPROTOOPT),
	"EOPNOTSUPP":    answers(0, unix.EOPNOTSUPP),
	"nothing":       answers(0, nil),
	"a short one":   answers(infoQueueEnd-1, nil, tcpListen),
	"gVisor's":      answers(infoQueueEnd, nil), // all zeros
	"another state": answers(infoQueueEnd, nil, append([]byte{1}, bytes.Repeat([]byte{9}, infoQueueEnd-1)...)...),
}

// answers has TCP_INFO answered with n bytes that begin with info.
func answers(n int, err error, info ...byte) func(sys *system) {
	return func(sys *system) {
		sys.getsockopt = func(_, _, _ int, p []byte) (int, error) {
			copy(p, info)
			return n, err
		}
	}
}

// hidden are kernels whose ceiling cannot be read.
var hidden = map[string]func(sys *system){
	"ENOENT":          ceilingFile("", os.ErrNotExist),
	"EACCES":          ceilingFile("", os.ErrPermission),
	"EIO":             ceilingFile("", unix.EIO),
	"empty":           ceilingFile("", nil),
	"a newline":       ceilingFile("\n", nil),
	"words":           ceilingFile("lots\n", nil),
	"two numbers":     ceilingFile("128 4096\n", nil),
	"negative":        ceilingFile("-1\n", nil),
	"33 bits":         ceilingFile("4294967296\n", nil),
	"a NUL behind it": ceilingFile("128\x00", nil),
}

func ceilingFile(text string, err error) func(sys *system) {
	return func(sys *system) {
		sys.readFile = func(string) ([]byte, error) { return []byte(text), err }
	}
}

// What a socket does not tell is worked out by the rule, and said to be; no
// reason not to listen.
func TestLimitThatCannotBeReadIsByTheRule(t *testing.T) {
	for name, breaks := range unreadable {
		t.Run(name, func(t *testing.T) {
			sys := realSystem
			breaks(&sys)
			ceilingFile("5\n", nil)(&sys)
			for n, limit := range map[int]int{-1: 5, 0: 0, 2: 2, 5: 5, 6: 5} {
				ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n)})
				require.NoError(t, err)
				require.NoError(t, ln.Close())
				require.Equal(t, Backlog{
					Requested: n, Ceiling: 5, Limit: limit, Effective: limit, Capacity: limit + 1,
				}, ln.Backlog(), "asked %d", n)
			}
		})
	}
}

func TestCeilingThatCannotBeReadIsUnknown(t *testing.T) {
	for name, breaks := range hidden {
		t.Run(name, func(t *testing.T) {
			sys := realSystem
			breaks(&sys)
			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			require.NoError(t, err, "the socket tells")
			defer ln.Close()
			require.Equal(t, Backlog{
				Requested: 1, Ceiling: -1, Limit: 1, Effective: 1, Capacity: 2, Measured: true,
			}, ln.Backlog())

			b, err := sys.predict(1)
			require.Error(t, err)
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, b)
		})
	}
}

func TestNothingCanBeRead(t *testing.T) {
	for name, breaks := range hidden {
		t.Run(name, func(t *testing.T) {
			sys := realSystem
			unreadable["gVisor's"](&sys)
			breaks(&sys)
			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, ln.Backlog())
			require.Equal(t, -1, ln.EffectiveBacklog())

			var bound string
			sys.bind = noteBound(t, &bound)
			err = refused(t, func() (*Listener, error) {
				return sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			})
			require.ErrorIs(t, err, errors.ErrUnsupported, "strict needs to know")
			freeAgain(t, "tcp", bound)
		})
	}
}
