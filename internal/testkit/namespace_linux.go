package testkit

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A visited is a network namespace with a thread of this test in it, which runs functions
// there.
type visited struct{ do chan func() }

// NewVisited creates a network namespace in which lo is up.
func NewVisited(t *testing.T) *visited {
	t.Helper()
	v := &visited{do: make(chan func())}
	made := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range v.do {
			f()
		}
	}()
	t.Cleanup(func() { close(v.do); <-ended })
	require.NoError(t, <-made)
	v.In(func() { loopbackUp(t) })
	return v
}

func (v *visited) In(f func()) {
	done := make(chan struct{})
	v.do <- func() { defer close(done); f() }
	<-done
}
