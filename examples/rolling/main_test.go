package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	try.Be(main)
	goleak.VerifyTestMain(m)
}

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
	for _, args := range [][]string{
		{"-mode", "open"}, {"-restarts", "0"}, {"-restarts", "-1"}, {"-clients", "0"}, {"-clients", "-1"},
	} {
		try.Fails(t, try.Program(t, args...), 1, "rolling", args[1])
	}
	try.Misused(t, "rolling", `"40"`, "40")
	needDrain(t)
	try.ClosedPipe(t, "rolling", "-restarts", "1", "-clients", "1")
}

// A program that is interrupted tells what its clients saw until then.
func TestProgramInterrupted(t *testing.T) {
	needDrain(t)
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		cmd := try.Program(t, "-restarts", "1000000", "-clients", "4")
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Start(); err != nil {
			t.Skipf("this system cannot start a program: %v", err)
		}
		<-time.After(wait)
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			t.Skipf("this system sends no SIGINT: %v", err)
		}
		err := cmd.Wait()
		if cmd.ProcessState.ExitCode() == -1 && wait < 10*time.Second {
			continue // the signal came before the program was ready for it
		}
		require.Equal(t, 1, cmd.ProcessState.ExitCode(), "%v", err)
		require.Regexp(t, `^drain, +\d+ restarts: \d+ ok, \d+ lost, \d+ stalled above 900ms\n$`, out.String())
		require.Regexp(t, `^rolling: interrupted after \d+ of 1000000 restarts.*\n$`, errs.String())
		return
	}
}

func TestInterrupted(t *testing.T) {
	needDrain(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := run(ctx, modeDrain, 5, 4)
	require.ErrorIs(t, err, context.Canceled)
}
