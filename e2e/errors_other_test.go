//go:build js || plan9 || wasip1

package e2e

import (
	"errors"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestControlIsUnsupported(t *testing.T) {
	err := testkit.Refused(t, func() (*acceptq.Listener, error) {
		return acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(func(string, string, syscall.RawConn) error { return nil }))
	})
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
