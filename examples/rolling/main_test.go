package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
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

// needOverlap ends a test where no two processes can listen on one port.
func needOverlap(t *testing.T) {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort())
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	ln.Close()
}

// output runs the program to its end.
func output(t *testing.T, args ...string) string {
	t.Helper()
	cmd := try.Program(t, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Skipf("this system starts no program: %v", err)
	}
	require.NoError(t, cmd.Wait(), "%s", &errs)
	return out.String()
}

func TestOverlap(t *testing.T) {
	needOverlap(t)
	lost := "0 lost"
	if runtime.GOOS != "linux" { // elsewhere the last moment before Close is open
		lost = `\d+ lost`
	}
	require.Regexp(t, `^graceful, overlap true, 4 restarts: \d+ answered, `+lost+`, 0 refused, \d+ stalled above 900ms\n$`,
		output(t, "-restarts", "4", "-clients", "16"))
}

func TestNoOverlap(t *testing.T) {
	m := regexp.MustCompile(`^graceful, overlap false, 3 restarts: \d+ answered, (\d+) lost, \d+ refused, \d+ stalled above 900ms\n$`).
		FindStringSubmatch(output(t, "-restarts", "3", "-clients", "16", "-overlap=false"))
	require.NotNil(t, m)
	if runtime.GOOS == "linux" {
		require.Equal(t, "0", m[1], "nobody is lost who could connect")
	}
}

// Shutdown alone loses some, so the clients are a load.
func TestShutdown(t *testing.T) {
	needOverlap(t)
	require.Regexp(t, `^shutdown, overlap true, 10 restarts: \d+ answered, [1-9]\d* lost, `,
		output(t, "-restarts", "10", "-clients", "32", "-stop", "shutdown"))
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "rolling", `"40"`, "40")
	for _, args := range [][]string{
		{"-stop", "now"}, {"-restarts", "0"}, {"-restarts", "-1"}, {"-clients", "0"}, {"-clients", "-1"}, {"-clients", "2147483647"},
	} {
		try.Misused(t, "rolling", args[0], args...)
	}
	try.Fails(t, try.Program(t, "-serve", "nowhere"), 1, "rolling", "nowhere")
	try.ClosedPipe(t, "rolling", "-restarts", "1", "-clients", "1", "-overlap=false")
}

// A program that is interrupted tells what its clients saw until then.
func TestInterrupted(t *testing.T) {
	for wait := 100 * time.Millisecond; ; wait *= 2 {
		cmd := try.Program(t, "-restarts", "1000000", "-clients", "4", "-overlap=false")
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
		// Without output the signal came before the first answer.
		if (cmd.ProcessState.ExitCode() == -1 || out.Len() == 0) && wait < 10*time.Second {
			continue
		}
		require.ErrorAs(t, err, new(*exec.ExitError))
		require.Equal(t, 1, cmd.ProcessState.ExitCode())
		require.Regexp(t, `^graceful, overlap false, \d+ restarts: \d+ answered, \d+ lost, \d+ refused, \d+ stalled above 900ms\n$`, out.String())
		require.Regexp(t, `^rolling: ended after \d+ of 1000000 restarts: context canceled\n$`, errs.String())
		return
	}
}

// Clients that have no descriptors left are no loss of the servers: the program ends with an
// error that says so.
func TestClientsWithoutDescriptors(t *testing.T) {
	cmd := try.WithDescriptors(t, 40, "-restarts", "4", "-clients", "100")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Start())
	require.ErrorAs(t, cmd.Wait(), new(*exec.ExitError))
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	if out.Len() > 0 {
		require.Contains(t, out.String(), " 0 lost, ")
	}
	require.Contains(t, errs.String(), "too many open files")
}
