package acceptq

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The numbers that x/sys has for some systems only are those used here.
func TestOptionNumbers(t *testing.T) {
	names, ok := keepAliveNames()
	require.True(t, ok)
	require.Equal(t, [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, names)

	sys, set := realSystem, 0
	sys.setsockoptString = func(_, _, name int, _ string) error {
		set = name
		return nil
	}
	require.NoError(t, sys.setListening(-1, 10, &options{deferAccept: 1}))
	require.Equal(t, unix.SO_ACCEPTFILTER, set)
}

// listenFiltered listens with dataready, or skips: its module may be absent, which is
// said, with the command that loads it.
func listenFiltered(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	if errors.Is(err, unix.ENOENT) {
		requireListenError(t, ln, err)
		require.ErrorContains(t, err, "modload accf_dataready")
		require.Equal(t, before, openDescriptors())
		t.Skip("this kernel has no filter dataready: modload accf_dataready")
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestAcceptFilterUnknown(t *testing.T) {
	before := openDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", WithAcceptFilter("nosuchfilter", ""))
	require.ErrorIs(t, err, unix.ENOENT)
	require.ErrorContains(t, err, `"nosuchfilter": no such filter is loaded`)
	requireListenError(t, ln, err)
	require.Equal(t, before, openDescriptors())
}

// A silent client waits outside of the queue, beside one that speaks.
func TestAcceptFilterActs(t *testing.T) {
	for name, opt := range map[string]Option{
		"WithDeferAccept":  WithDeferAccept(time.Second),
		"WithAcceptFilter": WithAcceptFilter("dataready", ""),
	} {
		t.Run(name, func(t *testing.T) {
			ln := listenFiltered(t, WithBacklog(5), opt)
			require.Equal(t, "dataready", filterOf(t, ln))

			silent := dial(t, ln.Addr())
			speaker := dial(t, ln.Addr())
			_, err := speaker.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, speaker.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr(), "who speaks is accepted first")
			require.Zero(t, queued(t, ln))

			_, err = ln.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, "dataready", filterOf(t, ln), "listening again keeps it")
			_, err = silent.Write([]byte("x"))
			require.NoError(t, err)
			require.Equal(t, silent.LocalAddr(), acceptBy(t, ln, ln.Accept).RemoteAddr())
		})
	}
}

// At a limit of 5 there is room for 8 silent clients; the ninth pushes the oldest
// into the queue, without data.
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

func queued(t *testing.T, ln *Listener) int {
	t.Helper()
	s, err := ln.Stats()
	require.NoError(t, err)
	return s.Queued
}
