package netns_test

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The namespace of a socket is either known for certain or unknown.
func TestNamespaceOf(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	of := func(k sys.Calls) (ns netns.Namespace, err error) {
		testkit.OnDescriptor(t, ln.(*net.TCPListener), func(fd int) (int, error) {
			ns, _, err = netns.Of(&k, fd)
			return 0, nil
		})
		return ns, err
	}
	ns, err := of(sys.Real)
	require.NoError(t, err)
	require.Nil(t, ns.File, "the namespace of the calling thread")

	old := sys.Real
	old.Getsockopt = func(int, int, int, []byte) (int, error) { return 0, unix.ENOPROTOOPT }
	old.UnixSocket = func() (int, error) { return -1, errors.New("not asked") }
	ns, err = of(old)
	require.NoError(t, err, "a kernel before 5.14")
	require.Nil(t, ns.File)

	full := sys.Real
	full.UnixSocket = func() (int, error) { return -1, unix.EMFILE }
	_, err = of(full)
	require.ErrorIs(t, err, unix.EMFILE)
}

// A thread that enters a namespace returns to its own, and the error of the function is
// returned.
func TestNamespaceIsLeft(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		link := func() string {
			s, err := os.Readlink("/proc/thread-self/ns/net")
			require.NoError(t, err)
			return s
		}
		home := link()
		other := testkit.NewVisited(t)
		var away string
		var ln net.Listener
		other.In(func() {
			away = link()
			var err error
			ln, err = net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
		})
		defer ln.Close()
		require.NotEqual(t, home, away)
		testkit.OnDescriptor(t, ln.(*net.TCPListener), func(fd int) (int, error) {
			ns, _, err := netns.Of(&sys.Real, fd)
			require.NoError(t, err)
			require.NotNil(t, ns.File)
			defer ns.Close()
			for range 20 {
				var seen string
				require.ErrorIs(t, ns.In(func() error { seen = link(); return io.EOF }), io.EOF)
				require.Equal(t, away, seen)
				require.Equal(t, home, link())
			}
			return 0, nil
		})
	})
}
