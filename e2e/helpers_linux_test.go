package e2e

import (
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// fillOneByOne connects clients until the queue of ln has reached its capacity. It waits
// until each is in the queue before it connects the next, because only then the kernel
// enforces the limit exactly. One more client must be turned away.
func fillOneByOne(t *testing.T, ln net.Listener, capacity int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < capacity {
		c := testkit.ConnectOne(t, ln.Addr())
		require.NotNil(t, c, "full at %d of %d", len(clients), capacity)
		clients = append(clients, c)
		requireKernelQueue(t, ln.Addr(), len(clients))
	}
	require.Nil(t, testkit.ConnectOne(t, ln.Addr()), "the client above the capacity must be turned away")
	return clients
}

func requireKernelQueue(t *testing.T, addr net.Addr, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); testkit.KernelQueue(t, addr) != n; <-tick.C {
		require.True(t, time.Now().Before(deadline), "want %d queued, the kernel has %d", n, testkit.KernelQueue(t, addr))
	}
}

func instead(want, plain int) int {
	if want == unchanged {
		return plain
	}
	return want
}

// heapInUse returns the size of the live heap after a garbage collection.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // frees objects that a finalizer or a pool has kept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// heapSlack, in bytes, is more than the noise and less than a leak in each of thousands of
// listeners.
const heapSlack = 500_000

// exhaust opens descriptors until this process, which must be that of one test, has no
// free one.
func exhaust(t *testing.T) (files []*os.File) {
	t.Helper()
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 64}))
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			require.ErrorIs(t, err, unix.EMFILE)
			return files
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
}

// dialed connects n clients, and waits until all of them are in the queue.
func dialed(t *testing.T, ln *acceptq.Listener, n int) (clients []net.Conn) {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	before := s.Queued
	for range n {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == before+n
	}, testkit.Patience, time.Millisecond)
	return clients
}

// shardsOf returns the shards of s.
func shardsOf(s *acceptq.Shards) []*acceptq.Listener { return slices.Collect(s.All()) }

func mustWrap(t testing.TB, ln net.Listener) *acceptq.Listener {
	t.Helper()
	w, err := acceptq.Wrap(ln)
	require.NoError(t, err)
	return w
}
