//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"bytes"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// If listen(2) fails in SetBacklog, Backlog still reports the former limit.
func TestFailedSetBacklogKeepsTheBacklog(t *testing.T) {
	k := realKernel
	calls := 0
	k.listenCall = func(fd, backlog int) error {
		if calls++; calls > 1 {
			return unix.EAGAIN // FreeBSD 14: another thread is in a call on the socket
		}
		return realKernel.listenCall(fd, backlog)
	}
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(2)})
	require.NoError(t, err)
	defer ln.Close()
	before := ln.Backlog()

	account, err := ln.SetBacklog(3)
	require.ErrorIs(t, err, unix.EAGAIN)
	require.Equal(t, before, account)
	require.Equal(t, before, ln.Backlog())
	require.Equal(t, before.Effective, ln.EffectiveBacklog())
}

// Two calls of SetBacklog run one after the other. Otherwise Backlog could mix the
// request of one with the limit of the other. The test blocks the first in listen(2)
// until the second waits for the lock or, if there is no lock, is in listen(2) too.
func TestSetBacklogOneAtATime(t *testing.T) {
	k := realKernel
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(2)})
	require.NoError(t, err)
	defer ln.Close()

	var inside, most atomic.Int32
	var second sync.WaitGroup
	var once sync.Once
	k.listenCall = func(fd, backlog int) error {
		most.Store(max(most.Load(), inside.Add(1)))
		defer inside.Add(-1)
		once.Do(func() {
			second.Go(func() { ln.SetBacklog(5) })
			require.True(t, eventually(func() bool { return inside.Load() > 1 || waitsForResize() }))
		})
		return realKernel.listenCall(fd, backlog)
	}
	b, err := ln.SetBacklog(4)
	require.NoError(t, err)
	require.Equal(t, 4, b.Requested)
	second.Wait()
	require.EqualValues(t, 1, most.Load(), "calls of listen(2) at a time")
	b = ln.Backlog()
	require.Equal(t, 5, b.Requested)
	require.True(t, b.Limit >= 5 || b.Limit == unknown, "%v", b)
}

// waitsForResize reports whether a goroutine waits for a lock in SetBacklog.
func waitsForResize() bool {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for g := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(g, []byte("[sync.Mutex.Lock")) && bytes.Contains(g, []byte("(*Listener).SetBacklog(")) {
			return true
		}
	}
	return false
}
