package acceptq

import (
	"errors"
	"io/fs"
	"math"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// SetBacklog lengthens and shortens a queue with clients, and loses none of them.
func TestSetBacklogLosesNobody(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(5))
		require.NoError(t, err)
		defer ln.Close()
		resize := func(n, queued int) {
			t.Helper()
			b, err := ln.SetBacklog(n)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: n, Ceiling: 4096, Limit: n, Effective: n, Capacity: n + 1, Measured: true}, b)
			require.Equal(t, b, ln.Backlog())
			require.Equal(t, n, ln.EffectiveBacklog())
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, n, s.Limit)
			require.Equal(t, queued, s.Queued)
			require.Equal(t, queued, kernelQueue(t, ln.Addr()))
		}
		setSysctl(t, "net.core.somaxconn", 4096)
		clients := fillOneByOne(t, ln, 6)
		resize(50, 6)
		for len(clients) < 20 {
			c := connectOne(t, ln.Addr())
			require.NotNil(t, c, "the queue has grown")
			clients = append(clients, c)
			requireKernelQueue(t, ln.Addr(), len(clients))
		}
		resize(2, 20)
		require.Nil(t, connectOne(t, ln.Addr()), "20 wait where 3 fit")

		for left := 20; left > 3; left-- {
			acceptAndExchange(t, ln, clients)
		}
		require.Nil(t, connectOne(t, ln.Addr()), "3 wait where 3 fit")
		acceptAndExchange(t, ln, clients)
		late := connectOne(t, ln.Addr())
		require.NotNil(t, late, "2 wait where 3 fit")
		requireKernelQueue(t, ln.Addr(), 3)
		clients = append(clients, late)
		resize(0, 3)
		resize(1, 3)
		for range 3 {
			acceptAndExchange(t, ln, clients)
		}
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Zero(t, s.Queued, "all queued connections were accepted")
	})
}

// After the ceiling was raised, SetBacklog takes effect at once.
func TestSetBacklogAfterTheCeilingWasRaised(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 3)
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(4096))
		require.NoError(t, err)
		defer ln.Close()
		clients := fillOneByOne(t, ln, 4)
		setSysctl(t, "net.core.somaxconn", 196602)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, 3, s.Limit, "a listening socket keeps its limit")
		require.Equal(t, 3, ln.EffectiveBacklog())
		require.Contains(t, ln.Backlog().String(), "SetBacklog(4096)")

		b, err := ln.SetBacklog(4096)
		require.NoError(t, err)
		require.Equal(t, Backlog{
			Requested: 4096, Ceiling: 196602, Limit: 4096, Effective: 4096, Capacity: 4097, Measured: true,
		}, b)
		clients = append(clients, connectOne(t, ln.Addr()))
		requireKernelQueue(t, ln.Addr(), 5)
		b, err = ln.SetBacklog(-1)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit, "the limit has more than 16 bits")
		b, err = ln.SetBacklog(math.MaxInt)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit)
		require.True(t, b.Clamped())
		for range clients {
			acceptAndExchange(t, ln, clients)
		}
	})
}

// With WithStrictBacklog, SetBacklog changes nothing if the kernel would grant less.
func TestStrictSetBacklogKeepsTheLimit(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 16)
		const command = "sysctl -w net.core.somaxconn=17"
		keeps := func(t *testing.T, ln *Listener, ceiling int, raise string) {
			t.Helper()
			before := ln.Backlog()
			b, err := ln.SetBacklog(17)
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.Equal(t, ClampError{
				Requested: 17, Limit: 16, Ceiling: ceiling,
				Knob: "net.core.somaxconn", Raise: raise,
			}, *clamp)
			requireOp(t, err, "listen")
			require.Equal(t, before, b)
			require.Equal(t, before, ln.Backlog())
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, before.Limit, s.Limit, "the limit of the kernel")
		}
		listen := func(t *testing.T, k *kernel, n int) *Listener {
			t.Helper()
			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n), WithStrictBacklog()})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			return ln
		}
		t.Run("by prediction", func(t *testing.T) {
			calls := 0
			k := realKernel
			k.listenCall = func(fd, n int) error { calls++; return realKernel.listenCall(fd, n) }
			ln := listen(t, &k, 8)
			calls = 0
			keeps(t, ln, 16, command)
			require.Zero(t, calls, "listen(2) must not be called")
			b, err := ln.SetBacklog(16)
			require.NoError(t, err)
			require.Equal(t, 16, b.Limit)
			keeps(t, ln, 16, command)
			b, err = ln.SetBacklog(-1)
			require.NoError(t, err, "a request for the maximum is never clamped")
			require.Equal(t, 16, b.Limit)
		})
		// listen(2) cannot be undone: a ceiling that was lowered in the meantime would
		// shorten the queue for good.
		t.Run("the ceiling cannot be read", func(t *testing.T) {
			defer setSysctl(t, "net.core.somaxconn", 16)
			setSysctl(t, "net.core.somaxconn", 1000)
			k := realKernel
			ln := listen(t, &k, 1000)
			for _, ceiling := range []int{100, 1000, 2000} {
				setSysctl(t, "net.core.somaxconn", ceiling)
				k.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
				for _, n := range []int{1001, 1000, 5} {
					b, err := ln.SetBacklog(n)
					requireOp(t, err, "listen")
					require.ErrorIs(t, err, errors.ErrUnsupported)
					require.ErrorIs(t, err, fs.ErrPermission)
					require.Equal(t, Backlog{Requested: 1000, Ceiling: unknown, Limit: 1000, Effective: 1000, Capacity: 1001, Measured: true}, b)
					require.Equal(t, b, ln.Backlog())
					s, err := ReadStats(ln.TCPListener())
					require.NoError(t, err)
					require.Equal(t, 1000, s.Limit, "the limit of the kernel")
				}
			}
			b, err := ln.SetBacklog(-1)
			require.NoError(t, err, "a request for the maximum is never clamped")
			require.Equal(t, 2000, b.Limit)
		})
		t.Run("a wrong number in the file", func(t *testing.T) {
			k := realKernel
			k.readFile = func(string) ([]byte, error) { return []byte("4096\n"), nil }
			ln := listen(t, &k, 8)
			b, err := ln.SetBacklog(17)
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.Equal(t, ClampError{Requested: 17, Limit: 16, Ceiling: 4096, Knob: "net.core.somaxconn"}, *clamp)
			require.Equal(t, Backlog{Requested: 17, Ceiling: 4096, Limit: 16, Effective: 16, Capacity: 17, Measured: true}, b)
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, 16, s.Limit, "Backlog must report the real limit")
		})
		t.Run("nothing can be read after listening", func(t *testing.T) {
			k := realKernel
			ln := listen(t, &k, 8)
			before := ln.EffectiveBacklog()
			k.readFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			k.getsockopt = func(int, int, int, []byte) (int, error) { return 0, syscall.EPERM }
			b, err := ln.SetBacklog(16)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			require.Equal(t, before, b.Limit)
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, before, s.Limit, "the limit of the kernel")
		})
		t.Run("the limit cannot be read", func(t *testing.T) {
			k := realKernel
			ln := listen(t, &k, 8)
			k.getsockopt = func(int, int, int, []byte) (int, error) { return 0, syscall.EPERM }
			b, err := ln.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 16, Limit: 9, Effective: 9, Capacity: 10}, b, "by prediction")
		})
	})
}
