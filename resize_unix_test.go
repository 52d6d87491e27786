//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// When listening again fails, what was granted before is granted still.
func TestSetBacklogThatFailsKeepsTheAccount(t *testing.T) {
	sys := realSystem
	calls := 0
	sys.listenCall = func(fd, backlog int) error {
		if calls++; calls > 1 {
			return unix.EAGAIN // FreeBSD 14: another thread is in a call on the socket
		}
		return realSystem.listenCall(fd, backlog)
	}
	ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(2)})
	require.NoError(t, err)
	defer ln.Close()
	before := ln.Backlog()

	account, err := ln.SetBacklog(3)
	require.ErrorIs(t, err, unix.EAGAIN)
	require.Equal(t, before, account)
	require.Equal(t, before, ln.Backlog())
	require.Equal(t, before.Effective, ln.EffectiveBacklog())
}
