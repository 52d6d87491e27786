package acceptq

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A visited is a network namespace with a thread of this test in it, which runs functions
// there.
type visited struct{ do chan func() }

// newVisited creates a network namespace in which lo is up.
func newVisited(t *testing.T) *visited {
	t.Helper()
	v := &visited{do: make(chan func())}
	made := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range v.do {
			f()
		}
	}()
	t.Cleanup(func() { close(v.do); <-ended })
	require.NoError(t, <-made)
	v.in(func() { loopbackUp(t) })
	return v
}

func (v *visited) in(f func()) {
	done := make(chan struct{})
	v.do <- func() { defer close(done); f() }
	<-done
}

// A program listens in another network namespace and calls the Listener from any
// thread. The numbers must be those of the namespace of the socket.
func TestListenerInAnotherNamespace(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 100)
		for _, row := range []struct {
			name    string
			kernel  func() kernel
			entered bool
		}{
			{"a namespace that can be entered", func() kernel { return realKernel }, true},
			{"a namespace without a name", func() kernel {
				k := realKernel
				k.namespaceFile = func(int) (*os.File, error) { return nil, unix.EPERM }
				return k
			}, false},
			{"a file that is not a namespace", func() kernel {
				k := realKernel
				k.namespaceFile = func(int) (*os.File, error) { return os.Open("/dev/null") }
				return k
			}, false},
		} {
			t.Run(row.name, func(t *testing.T) {
				other := newVisited(t)
				var ln *Listener
				other.in(func() {
					require.NoError(t, os.WriteFile("/proc/sys/net/core/somaxconn", []byte("3000"), 0))
					k := row.kernel()
					var err error
					ln, err = k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(200), WithStrictBacklog()})
					require.NoError(t, err)
				})
				defer ln.Close()

				if row.entered {
					require.Equal(t, 3000, ln.Backlog().Ceiling)
				} else {
					require.Equal(t, unknown, ln.Backlog().Ceiling)
				}
				b, err := ln.SetBacklog(2000)
				if row.entered {
					require.NoError(t, err, "the ceiling of 100 belongs to another namespace")
					require.Equal(t, 2000, b.Limit)
					_, err = ln.SetBacklog(5000)
					var clamp *ClampError
					require.ErrorAs(t, err, &clamp)
					require.Equal(t, 3000, clamp.Limit)
					require.Equal(t, 2000, ln.Backlog().Limit, "the limit must not change")
				} else {
					require.ErrorIs(t, err, errors.ErrUnsupported, "what the kernel would grant cannot be predicted")
					require.Equal(t, 200, b.Limit, "the limit must not change")
				}

				// A handshake is in flight there for longer than a drain waits that
				// cannot read it.
				var fd int
				other.in(func() { fd = deafSocket(t, ln.Addr()) })
				drained := inBackground(t, ln, within(t, patience))
				untilStopped(t, ln, way{len(dropSYN), 0, -1})
				require.ErrorAs(t, ln.Drain(within(t, 100*time.Millisecond)), new(*DrainError))
				c := hearing(t, fd)
				s, err := ln.Accept()
				require.NoError(t, err)
				defer s.Close()
				talk(t, c, s)
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.NoError(t, received(t, drained))
			})
		}
	})
}

// deafSocket starts a handshake in the namespace of the calling thread and drops the
// answer.
func deafSocket(t *testing.T, addr net.Addr) (fd int) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, maxTTL))
	sa := &unix.SockaddrInet4{Port: addr.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	require.ErrorIs(t, unix.Connect(fd, sa), unix.EINPROGRESS)
	for deadline := time.Now().Add(patience); synReceived(t, addr) != 1; runtime.Gosched() { // on this thread
		require.True(t, time.Now().Before(deadline))
	}
	return fd
}

// hearing lets a deafSocket receive, and waits until it is connected.
func hearing(t *testing.T, fd int) net.Conn {
	t.Helper()
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, 0))
	require.Eventually(t, func() bool {
		_, err := unix.Getpeername(fd)
		return err == nil
	}, patience, time.Millisecond)
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	c, err := net.FileConn(f)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// The namespace of a socket is either known for certain or unknown.
func TestNamespaceOf(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	of := func(k kernel) (ns namespace, err error) {
		onDescriptor(t, ln.(*net.TCPListener), func(fd int) (int, error) {
			ns, _, err = k.namespaceOf(fd)
			return 0, nil
		})
		return ns, err
	}
	ns, err := of(realKernel)
	require.NoError(t, err)
	require.Nil(t, ns.file, "the namespace of the calling thread")

	old := realKernel
	old.getsockopt = func(int, int, int, []byte) (int, error) { return 0, unix.ENOPROTOOPT }
	old.unixSocket = func() (int, error) { return -1, errors.New("not asked") }
	ns, err = of(old)
	require.NoError(t, err, "a kernel before 5.14")
	require.Nil(t, ns.file)

	full := realKernel
	full.unixSocket = func() (int, error) { return -1, unix.EMFILE }
	_, err = of(full)
	require.ErrorIs(t, err, unix.EMFILE)
}

// A thread that enters a namespace returns to its own, and the error of the function is
// returned.
func TestNamespaceIsLeft(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		link := func() string {
			s, err := os.Readlink("/proc/thread-self/ns/net")
			require.NoError(t, err)
			return s
		}
		home := link()
		other := newVisited(t)
		var away string
		var ln net.Listener
		other.in(func() {
			away = link()
			var err error
			ln, err = net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
		})
		defer ln.Close()
		require.NotEqual(t, home, away)
		onDescriptor(t, ln.(*net.TCPListener), func(fd int) (int, error) {
			ns, _, err := realKernel.namespaceOf(fd)
			require.NoError(t, err)
			require.NotNil(t, ns.file)
			defer ns.close()
			for range 20 {
				var seen string
				require.ErrorIs(t, ns.in(func() error { seen = link(); return io.EOF }), io.EOF)
				require.Equal(t, away, seen)
				require.Equal(t, home, link())
			}
			return 0, nil
		})
	})
}
