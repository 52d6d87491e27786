package e2e

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// SetBacklog lengthens and shortens a queue with clients, and loses none of them.
func TestSetBacklogLosesNobody(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(5))
		require.NoError(t, err)
		defer ln.Close()
		resize := func(n, queued int) {
			t.Helper()
			b, err := ln.SetBacklog(n)
			require.NoError(t, err)
			require.Equal(t, acceptq.Backlog{Requested: n, Ceiling: 4096, Limit: n, Effective: n, Capacity: n + 1, Measured: true}, b)
			require.Equal(t, b, ln.Backlog())
			require.Equal(t, n, ln.EffectiveBacklog())
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, n, s.Limit)
			require.Equal(t, queued, s.Queued)
			require.Equal(t, queued, testkit.KernelQueue(t, ln.Addr()))
		}
		testkit.SetSysctl(t, "net.core.somaxconn", 4096)
		clients := fillOneByOne(t, ln, 6)
		resize(50, 6)
		for len(clients) < 20 {
			c := testkit.ConnectOne(t, ln.Addr())
			require.NotNil(t, c, "the queue has grown")
			clients = append(clients, c)
			requireKernelQueue(t, ln.Addr(), len(clients))
		}
		resize(2, 20)
		require.Nil(t, testkit.ConnectOne(t, ln.Addr()), "20 wait where 3 fit")

		for left := 20; left > 3; left-- {
			testkit.AcceptAndExchange(t, ln, clients)
		}
		require.Nil(t, testkit.ConnectOne(t, ln.Addr()), "3 wait where 3 fit")
		testkit.AcceptAndExchange(t, ln, clients)
		late := testkit.ConnectOne(t, ln.Addr())
		require.NotNil(t, late, "2 wait where 3 fit")
		requireKernelQueue(t, ln.Addr(), 3)
		clients = append(clients, late)
		resize(0, 3)
		resize(1, 3)
		for range 3 {
			testkit.AcceptAndExchange(t, ln, clients)
		}
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Zero(t, s.Queued, "all queued connections were accepted")
	})
}

// After the ceiling was raised, SetBacklog takes effect at once.
func TestSetBacklogAfterTheCeilingWasRaised(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 3)
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(4096))
		require.NoError(t, err)
		defer ln.Close()
		clients := fillOneByOne(t, ln, 4)
		testkit.SetSysctl(t, "net.core.somaxconn", 196602)
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, 3, s.Limit, "a listening socket keeps its limit")
		require.Equal(t, 3, ln.EffectiveBacklog())
		require.Contains(t, ln.Backlog().String(), "SetBacklog(4096)")

		b, err := ln.SetBacklog(4096)
		require.NoError(t, err)
		require.Equal(t, acceptq.Backlog{
			Requested: 4096, Ceiling: 196602, Limit: 4096, Effective: 4096, Capacity: 4097, Measured: true,
		}, b)
		clients = append(clients, testkit.ConnectOne(t, ln.Addr()))
		requireKernelQueue(t, ln.Addr(), 5)
		b, err = ln.SetBacklog(-1)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit, "the limit has more than 16 bits")
		b, err = ln.SetBacklog(math.MaxInt)
		require.NoError(t, err)
		require.Equal(t, 196602, b.Limit)
		require.True(t, b.Clamped())
		for range clients {
			testkit.AcceptAndExchange(t, ln, clients)
		}
	})
}
