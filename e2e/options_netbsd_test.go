package e2e

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The option numbers in this package match those that x/sys has for some systems.
func TestOptionNumbers(t *testing.T) {
	names, ok := sockopt.KeepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	k, set := sys.Real, 0
	k.SetsockoptString = func(_, _, name int, _ string) error {
		set = name
		return nil
	}
	require.NoError(t, sockopt.SetAfterListen(&k, -1, &sockopt.Options{DeferAccept: 1}))
	require.Equal(t, unix.SO_ACCEPTFILTER, set)
}

// At a limit of 5 the kernel holds back 8 silent clients. With the ninth it puts the
// oldest into the queue, without data.
func TestAcceptFilterLetsTheOldestThrough(t *testing.T) {
	ln := listenFiltered(t, acceptq.WithBacklog(5), acceptq.WithDeferAccept(time.Second))
	oldest := testkit.Dial(t, ln.Addr())
	for range 7 {
		testkit.Dial(t, ln.Addr())
	}
	require.Zero(t, queued(t, ln))
	testkit.Dial(t, ln.Addr())
	require.True(t, testkit.Eventually(func() bool { return queued(t, ln) == 1 }))
	require.Equal(t, oldest.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr())
}

func queued(t *testing.T, ln *acceptq.Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Queued
}
