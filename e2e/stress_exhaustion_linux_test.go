package e2e

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// Without a free descriptor, calls that need one return EMFILE and the other calls
// work. The queued clients stay queued. When descriptors are free again, everything
// works as before.
func TestOutOfDescriptors(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.FreeAgain(t, "tcp", ":0") // package net probes the address families once
		ln := listen(t, acceptq.WithBacklog(8))
		s, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
		require.NoError(t, err)
		defer s.Close()
		clients := dialed(t, ln, 3)
		before := testkit.OpenDescriptors()
		files := exhaust(t)
		full := testkit.OpenDescriptors()

		for range 3 {
			_, err := ln.Accept()
			require.ErrorIs(t, err, unix.EMFILE)
			testkit.RequireOp(t, err, "accept")
			err = testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(1)) })
			require.ErrorIs(t, err, unix.EMFILE)
			err = testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP("[::1%lo]:0") })
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = endpoint.Endpoint{Network: "tcp6", At: netip.MustParseAddrPort("[::1%lo]:80")}.Sockaddr()
			require.ErrorIs(t, err, unix.EMFILE, "the zone cannot be checked without a descriptor")
			more, err := acceptq.ListenTCPShards("127.0.0.1:0", 3)
			require.Nil(t, more)
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = ln.File()
			require.ErrorIs(t, err, unix.EMFILE)

			b, err := ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, acceptq.Backlog{Requested: 7, Ceiling: sys.Unknown, Limit: 7, Effective: 7, Capacity: 8, Measured: true}, b)
			stats, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, 3, stats.Queued)
			_, err = acceptq.ReadStats(ln)
			require.NoError(t, err)
			_, err = s.Stats()
			require.NoError(t, err)
			system, err := acceptq.ReadSystem()
			require.ErrorIs(t, err, unix.EMFILE)
			require.EqualValues(t, sys.Unknown, system.Ceiling)
			require.EqualValues(t, sys.Unknown, system.ListenDrops)
			require.Contains(t, ln.Backlog().String(), "net.core.somaxconn is unknown")
			_, err = ln.Waiting(t.Context())
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = ln.Handshakes(t.Context())
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = acceptq.Wrap(ln.TCPListener())
			require.NoError(t, err)

			// The handshakes in flight cannot be read.
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			var drained *acceptq.DrainError
			require.ErrorAs(t, ln.Drain(ctx), &drained)
			require.Equal(t, 3, drained.Queued)
			require.Equal(t, sys.Unknown, drained.InFlight)
			require.ErrorAs(t, s.Drain(ctx), &drained)
			require.Equal(t, full, testkit.OpenDescriptors())
		}

		// With three free descriptors everything can be read.
		for _, f := range files[:3] {
			f.Close()
		}
		system, err := acceptq.ReadSystem()
		require.NoError(t, err)
		require.Positive(t, system.Ceiling)
		require.NotEqualValues(t, sys.Unknown, system.ListenDrops)
		require.Contains(t, ln.Backlog().String(), "net.core.somaxconn is "+strconv.Itoa(system.Ceiling))
		waiting, err := ln.Waiting(t.Context())
		require.NoError(t, err)
		require.Len(t, waiting, 3)
		_, err = ln.Handshakes(t.Context())
		require.NoError(t, err)
		for _, f := range files[3:] {
			f.Close()
		}
		for _, c := range clients {
			testkit.Talk(t, c, testkit.AcceptBy(t, ln, ln.Accept))
		}
		for l := range s.All() {
			require.NoError(t, l.Resume())
		}
		c := testkit.Dial(t, s.Addr())
		var taken net.Conn
		for l := range s.All() {
			if stats, err := l.Stats(); err == nil && stats.Queued > 0 {
				taken = testkit.AcceptBy(t, l, l.Accept)
			}
		}
		require.NotNil(t, taken)
		testkit.Talk(t, c, taken)
		require.Equal(t, before+5, testkit.OpenDescriptors(), "three accepted, and one that connected and was accepted")
	})
}

// Thousands of listeners are opened, used in every way and closed. They leave no
// descriptor, goroutine or memory behind.
func TestThousandsOfListeners(t *testing.T) {
	round := func(i int) {
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(i%64))
		require.NoError(t, err)
		defer ln.Close()
		_, err = ln.Stats()
		require.NoError(t, err)
		_, err = ln.SetBacklog(5)
		require.NoError(t, err)
		if i%10 > 0 {
			return
		}
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		defer c.Close()
		if i%20 > 0 {
			return // the connection is reset
		}
		s, err := ln.Accept()
		require.NoError(t, err)
		s.Close()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		var drained *acceptq.DrainError
		require.ErrorAs(t, ln.Drain(ctx), &drained) // Accept has not been called again
		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 4)
		require.NoError(t, err)
		require.NoError(t, shards.Close())
	}
	round(0)
	goroutines, descriptors, before := runtime.NumGoroutine(), testkit.OpenDescriptors(), heapInUse()
	const n = 3000
	for i := range n {
		round(i)
	}
	require.True(t, testkit.Eventually(func() bool { return runtime.NumGoroutine() <= goroutines }))
	require.Equal(t, descriptors, testkit.OpenDescriptors())
	after := heapInUse()
	t.Logf("heap: %d bytes before %d listeners, %d after", before, n, after)
	require.Less(t, after, before+heapSlack)
}
