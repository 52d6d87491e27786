package main

import (
	"context"
	"errors"
	"runtime"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needDrain ends a test where Drain does not keep clients out: there some that
// come in the last moment are lost.
func needDrain(t *testing.T) {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	if err := ln.Drain(t.Context()); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no Drain on this system:", err)
	}
}

func TestDrain(t *testing.T) {
	needDrain(t)
	saw, err := run(t.Context(), modeDrain, 5, 16)
	require.NoError(t, err)
	require.Greater(t, saw.ok.Load(), int64(5*16))
	if runtime.GOOS == "linux" { // elsewhere the last moment before Close is open
		require.Zero(t, saw.lost.Load(), saw)
	}
}

// The others lose or do not, as it happens; they come to an end.
func TestOtherModes(t *testing.T) {
	needDrain(t)
	for _, mode := range []string{modeClose, modeRash} {
		saw, err := run(t.Context(), mode, 3, 16)
		require.NoError(t, err)
		require.Greater(t, saw.ok.Load(), int64(3*16-1))
	}
}

func TestWrongUse(t *testing.T) {
	for _, use := range []struct {
		mode              string
		restarts, clients int
	}{{"", 1, 1}, {"open", 1, 1}, {modeDrain, 0, 1}, {modeDrain, 1, 0}} {
		_, err := run(t.Context(), use.mode, use.restarts, use.clients)
		require.Error(t, err)
	}
}

func TestInterrupted(t *testing.T) {
	needDrain(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := run(ctx, modeDrain, 5, 4)
	require.ErrorIs(t, err, context.Canceled)
}
