package acceptq

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/sys"
)

func TestHandshakesOfBadInput(t *testing.T) {
	for _, l := range []*Listener{nil, {}} {
		n, err := l.Handshakes(t.Context())
		require.ErrorIs(t, err, sys.ErrNotListening)
		require.Equal(t, unknown, n)
	}
	ln, err := ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	n, err := ln.Handshakes(nil) //lint:ignore SA1012 the error is what is tested
	require.ErrorIs(t, err, errNilContext)
	require.Equal(t, unknown, n)
	n, err = ln.Handshakes(t.Context())
	if errors.Is(err, errors.ErrUnsupported) {
		require.Equal(t, unknown, n)
		return
	}
	require.NoError(t, err)
	require.Zero(t, n)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = ln.Handshakes(ended)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, ln.Close())
	_, err = ln.Handshakes(t.Context())
	require.ErrorIs(t, err, net.ErrClosed)
}
