//go:build dragonfly || freebsd || linux

package acceptq

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// needSpread skips a test if the kernel does not spread connections over shards.
func needSpread(t *testing.T) {
	t.Helper()
	if !spreads() {
		t.Skip("this kernel gives all connections to one of several listeners (in a jail FreeBSD before 13.3 does, and DragonFly): run it outside of the jail")
	}
}

// childEnv is set in a process that a test starts as another instance. Its value is the
// address.
const childEnv = "ACCEPTQ_TEST_CHILD"

// child returns a command that runs this test in a second process.
func child(t *testing.T, addr string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.timeout=55s")
	cmd.Env = append(os.Environ(), childEnv+"="+addr,
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise it ends a second later under -race
	cmd.Stderr = os.Stderr
	return cmd
}

// otherInstances are the ways in which another program can listen on addr.
func otherInstances(addr string) map[string]func() (io.Closer, error) {
	return map[string]func() (io.Closer, error){
		"net.Listen": func() (io.Closer, error) { return net.Listen("tcp", addr) },
		"plain":      func() (io.Closer, error) { return ListenTCP(addr) },
		"one shard":  func() (io.Closer, error) { return ListenTCPShards(addr, 1) },
		"sharded":    func() (io.Closer, error) { return ListenTCPShards(addr, 3) },
	}
}

// A second instance gets EADDRINUSE, in this process and in another one. It leaves nothing
// behind that would allow a further instance.
func TestShardsAreExclusive(t *testing.T) {
	if addr := os.Getenv(childEnv); addr != "" {
		for name, listen := range otherInstances(addr) {
			if _, err := listen(); err == nil {
				t.Errorf("%s can listen on the same address", name)
			} else {
				require.ErrorIs(t, err, syscall.EADDRINUSE, name)
			}
		}
		return
	}
	needSpread(t)
	s, err := ListenTCPShards("127.0.0.1:0", 2)
	require.NoError(t, err)
	defer s.Close()
	for range 2 {
		for name, listen := range otherInstances(s.Addr().String()) {
			_, err := listen()
			require.ErrorIs(t, err, syscall.EADDRINUSE, name)
			var op *net.OpError
			require.ErrorAs(t, err, &op, name)
			require.Equal(t, "listen", op.Op, name)
		}
	}
	var out bytes.Buffer
	other := child(t, s.Addr().String())
	other.Stdout = &out
	require.NoError(t, other.Run(), "in another process: %s", &out)
	require.True(t, strings.HasPrefix(out.String(), "PASS"), "%s", &out)
}

// If instances start at the same moment, a maximum of one gets the address.
func TestShardsStartedTogether(t *testing.T) {
	needSpread(t)
	first, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	addr := first.Addr().String()
	require.NoError(t, first.Close())
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	for range rounds {
		var (
			wait  sync.WaitGroup
			start = make(chan struct{})
			got   [4]*Shards
			errs  [len(got)]error
		)
		for i := range got {
			wait.Go(func() {
				<-start
				got[i], errs[i] = ListenTCPShards(addr, 2)
			})
		}
		close(start)
		wait.Wait()
		won := 0
		for i, s := range got {
			if s != nil {
				won++
				require.NoError(t, s.Close())
			} else {
				require.ErrorIs(t, errs[i], syscall.EADDRINUSE)
			}
		}
		require.LessOrEqual(t, won, 1)
	}
}

// With WithReusePort instances share the address, and all their queues get clients. An
// instance without it gets EADDRINUSE.
func TestShardsOfTwoInstances(t *testing.T) {
	needSpread(t)
	a, err := ListenTCPShards("127.0.0.1:0", 2, WithReusePort())
	require.NoError(t, err)
	defer a.Close()
	b, err := ListenTCPShards(a.Addr().String(), 2, WithReusePort())
	require.NoError(t, err)
	defer b.Close()
	for name, listen := range otherInstances(a.Addr().String()) {
		_, err := listen()
		require.ErrorIs(t, err, syscall.EADDRINUSE, name)
	}

	clients := shardClients()
	for _, c := range connectAll(t, a.Addr(), clients) {
		defer c.Close()
	}
	both := &Shards{listeners: append(shardsOf(a)[:2:2], shardsOf(b)...)}
	queuedBecomes(t, clients, both.Stats)
	for l := range both.All() {
		q, err := l.Stats()
		require.NoError(t, err)
		require.Positive(t, q.Queued)
	}
}

// If any call of any shard fails, the result is the error of that call. All shards are
// closed, and the address is free.
func TestShardsAllOrNothing(t *testing.T) {
	needSpread(t)
	const n = 4
	failing := map[string]func(k *kernel, fails func() error){
		"socket": func(k *kernel, fails func() error) {
			call := k.socket
			k.socket = func(domain int) (int, error) {
				if err := fails(); err != nil {
					return -1, err
				}
				return call(domain)
			}
		},
		"setsockopt": func(k *kernel, fails func() error) {
			call := k.setsockoptInt
			reuse, err := reusePort()
			require.NoError(t, err)
			k.setsockoptInt = func(fd, level, name, value int) error {
				if level == unix.SOL_SOCKET && name == reuse {
					if err := fails(); err != nil {
						return err
					}
				}
				return call(fd, level, name, value)
			}
		},
		"bind": func(k *kernel, fails func() error) {
			call := k.bind
			k.bind = func(fd int, sa unix.Sockaddr) error {
				if err := fails(); err != nil {
					return err
				}
				return call(fd, sa)
			}
		},
		"listen": func(k *kernel, fails func() error) {
			call := k.listenCall
			k.listenCall = func(fd, backlog int) error {
				if err := fails(); err != nil {
					return err
				}
				return call(fd, backlog)
			}
		},
		"adopt": func(k *kernel, fails func() error) {
			call := k.adopt
			k.adopt = func(f *os.File) (net.Listener, error) {
				if err := fails(); err != nil {
					return nil, err
				}
				return call(f)
			}
		},
	}
	for _, opts := range [][]Option{nil, {WithReusePort()}} {
		for name, with := range failing {
			for nth := 1; ; nth++ {
				calls := 0
				k := realKernel
				var bound string
				k.bind = noteBound(t, &bound)
				with(&k, func() error {
					if calls++; calls == nth {
						return unix.ENOBUFS
					}
					return nil
				})
				before := openDescriptors()
				s, err := k.shards(t.Context(), "tcp", "127.0.0.1:0", n, opts)
				if calls < nth { // there are fewer than nth calls
					require.NoError(t, err)
					require.NoError(t, s.Close())
					require.GreaterOrEqual(t, calls, n)
					break
				}
				require.Nil(t, s)
				require.ErrorIs(t, err, unix.ENOBUFS, "%s %d", name, nth)
				requireOp(t, err, "listen")
				require.Equal(t, before, openDescriptors(), "%s %d", name, nth)
				if bound != "" {
					freeAgain(t, "tcp", bound)
				}
			}
		}
	}
}
