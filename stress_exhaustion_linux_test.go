package acceptq

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Without a free descriptor, calls that need one return EMFILE and the other calls
// work. The queued clients stay queued. When descriptors are free again, everything
// works as before.
func TestOutOfDescriptors(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		freeAgain(t, "tcp", ":0") // package net probes the address families once
		ln := listen(t, WithBacklog(8))
		s, err := ListenTCPShards("127.0.0.1:0", 2)
		require.NoError(t, err)
		defer s.Close()
		clients := dialed(t, ln, 3)
		before := openDescriptors()
		files := exhaust(t)
		full := openDescriptors()

		for range 3 {
			_, err := ln.Accept()
			require.ErrorIs(t, err, unix.EMFILE)
			requireOp(t, err, "accept")
			err = refused(t, func() (*Listener, error) { return ListenTCP("127.0.0.1:0", WithBacklog(1)) })
			require.ErrorIs(t, err, unix.EMFILE)
			err = refused(t, func() (*Listener, error) { return ListenTCP("[::1%lo]:0") })
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = endpoint{network: "tcp6", at: netip.MustParseAddrPort("[::1%lo]:80")}.sockaddr()
			require.ErrorIs(t, err, unix.EMFILE, "the zone cannot be checked without a descriptor")
			more, err := ListenTCPShards("127.0.0.1:0", 3)
			require.Nil(t, more)
			require.ErrorIs(t, err, unix.EMFILE)
			_, err = ln.File()
			require.ErrorIs(t, err, unix.EMFILE)

			b, err := ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 7, Ceiling: unknown, Limit: 7, Effective: 7, Capacity: 8, Measured: true}, b)
			stats, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, 3, stats.Queued)
			_, err = ReadStats(ln)
			require.NoError(t, err)
			_, err = s.Stats()
			require.NoError(t, err)
			system, err := ReadSystem()
			require.NoError(t, err)
			require.EqualValues(t, unknown, system.Ceiling)
			require.EqualValues(t, unknown, system.ListenDrops)
			_, err = Wrap(ln.TCPListener())
			require.NoError(t, err)

			// The handshakes in flight cannot be read.
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			var drained *DrainError
			require.ErrorAs(t, ln.Drain(ctx), &drained)
			require.Equal(t, 3, drained.Queued)
			require.Equal(t, unknown, drained.InFlight)
			require.ErrorAs(t, s.Drain(ctx), &drained)
			require.Equal(t, full, openDescriptors())
		}

		for _, f := range files {
			f.Close()
		}
		for _, c := range clients {
			talk(t, c, acceptBy(t, ln, ln.Accept))
		}
		for l := range s.All() {
			require.NoError(t, l.Resume())
		}
		c := dial(t, s.Addr())
		var taken net.Conn
		for l := range s.All() {
			if stats, err := l.Stats(); err == nil && stats.Queued > 0 {
				taken = acceptBy(t, l, l.Accept)
			}
		}
		require.NotNil(t, taken)
		talk(t, c, taken)
		require.Equal(t, before+5, openDescriptors(), "three accepted, and one that connected and was accepted")
	})
}

// Thousands of listeners are opened, used in every way and closed. They leave no
// descriptor, goroutine or memory behind.
func TestThousandsOfListeners(t *testing.T) {
	round := func(i int) {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(i%64))
		require.NoError(t, err)
		defer ln.Close()
		_, err = ln.Stats()
		require.NoError(t, err)
		_, err = ln.SetBacklog(5)
		require.NoError(t, err)
		if i%10 > 0 {
			return
		}
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
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
		var drained *DrainError
		require.ErrorAs(t, ln.Drain(ctx), &drained) // Accept has not been called again
		shards, err := ListenTCPShards("127.0.0.1:0", 4)
		require.NoError(t, err)
		require.NoError(t, shards.Close())
	}
	round(0)
	goroutines, descriptors, before := runtime.NumGoroutine(), openDescriptors(), heapInUse()
	const n = 3000
	for i := range n {
		round(i)
	}
	require.True(t, eventually(func() bool { return runtime.NumGoroutine() <= goroutines }))
	require.Equal(t, descriptors, openDescriptors())
	after := heapInUse()
	t.Logf("heap: %d bytes before %d listeners, %d after", before, n, after)
	require.Less(t, after, before+heapSlack)
}
