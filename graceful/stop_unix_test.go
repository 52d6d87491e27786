//go:build unix

package graceful

import (
	"context"
	"net/http"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A signal that arrives after the start of the stop ends the stop at once.
func TestAbortBySignal(t *testing.T) {
	log := new(journal)
	inside := make(chan bool)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(inside)
		<-r.Context().Done()
	})}, listen(t), WithTimeout(time.Hour), log.option(), WithAbortSignal(syscall.SIGUSR1))
	dial(t, r.addr).send(get)
	<-inside
	r.stop()
	log.after(t, "first requests")
	self, err := os.FindProcess(os.Getpid())
	require.NoError(t, err)
	require.NoError(t, self.Signal(syscall.SIGUSR1))
	err = r.wait()
	var cut *Error
	require.ErrorAs(t, err, &cut)
	require.Equal(t, 1, cut.Active)
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, context.DeadlineExceeded)
	require.Contains(t, err.Error(), "user defined signal 1")
}
