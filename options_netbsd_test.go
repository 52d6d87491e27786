package acceptq

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The option numbers in this package match those that x/sys has for some systems.
func TestOptionNumbers(t *testing.T) {
	names, ok := keepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	k, set := realKernel, 0
	k.setsockoptString = func(_, _, name int, _ string) error {
		set = name
		return nil
	}
	require.NoError(t, k.setAfterListen(-1, &settings{deferAccept: 1}))
	require.Equal(t, unix.SO_ACCEPTFILTER, set)
}

// At a limit of 5 the kernel holds back 8 silent clients. With the ninth it puts the
// oldest into the queue, without data.
func TestAcceptFilterLetsTheOldestThrough(t *testing.T) {
	ln := listenFiltered(t, WithBacklog(5), WithDeferAccept(time.Second))
	oldest := dial(t, ln.Addr())
	for range 7 {
		dial(t, ln.Addr())
	}
	require.Zero(t, queued(t, ln))
	dial(t, ln.Addr())
	require.True(t, eventually(func() bool { return queued(t, ln) == 1 }))
	require.Equal(t, oldest.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr())
}
