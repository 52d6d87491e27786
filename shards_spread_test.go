//go:build dragonfly || freebsd || linux

package acceptq

import (
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// otherInstances are the ways in which another program can listen on addr.
func otherInstances(addr string) map[string]func() (io.Closer, error) {
	return map[string]func() (io.Closer, error){
		"net.Listen": func() (io.Closer, error) { return net.Listen("tcp", addr) },
		"plain":      func() (io.Closer, error) { return ListenTCP(addr) },
		"one shard":  func() (io.Closer, error) { return ListenTCPShards(addr, 1) },
		"sharded":    func() (io.Closer, error) { return ListenTCPShards(addr, 3) },
	}
}

// With WithReusePort instances share the address, and all their queues get clients. An
// instance without it gets EADDRINUSE.
func TestShardsOfTwoInstances(t *testing.T) {
	testkit.NeedSpread(t)
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
	for _, c := range testkit.ConnectAll(t, a.Addr(), clients) {
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
	testkit.NeedSpread(t)
	const n = 4
	failing := map[string]func(k *sys.Calls, fails func() error){
		"socket": func(k *sys.Calls, fails func() error) {
			call := k.Socket
			k.Socket = func(domain int) (int, error) {
				if err := fails(); err != nil {
					return -1, err
				}
				return call(domain)
			}
		},
		"setsockopt": func(k *sys.Calls, fails func() error) {
			call := k.SetsockoptInt
			reuse, err := sockopt.ReusePort()
			require.NoError(t, err)
			k.SetsockoptInt = func(fd, level, name, value int) error {
				if level == unix.SOL_SOCKET && name == reuse {
					if err := fails(); err != nil {
						return err
					}
				}
				return call(fd, level, name, value)
			}
		},
		"bind": func(k *sys.Calls, fails func() error) {
			call := k.Bind
			k.Bind = func(fd int, sa unix.Sockaddr) error {
				if err := fails(); err != nil {
					return err
				}
				return call(fd, sa)
			}
		},
		"listen": func(k *sys.Calls, fails func() error) {
			call := k.Listen
			k.Listen = func(fd, backlog int) error {
				if err := fails(); err != nil {
					return err
				}
				return call(fd, backlog)
			}
		},
		"adopt": func(k *sys.Calls, fails func() error) {
			call := k.Adopt
			k.Adopt = func(f *os.File) (net.Listener, error) {
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
				k := sys.Real
				var bound string
				k.Bind = noteBound(t, &bound)
				with(&k, func() error {
					if calls++; calls == nth {
						return unix.ENOBUFS
					}
					return nil
				})
				before := testkit.OpenDescriptors()
				s, err := listenShards(&k, t.Context(), "tcp", "127.0.0.1:0", n, opts)
				if calls < nth { // there are fewer than nth calls
					require.NoError(t, err)
					require.NoError(t, s.Close())
					require.GreaterOrEqual(t, calls, n)
					break
				}
				require.Nil(t, s)
				require.ErrorIs(t, err, unix.ENOBUFS, "%s %d", name, nth)
				testkit.RequireOp(t, err, "listen")
				require.Equal(t, before, testkit.OpenDescriptors(), "%s %d", name, nth)
				if bound != "" {
					testkit.FreeAgain(t, "tcp", bound)
				}
			}
		}
	}
}
