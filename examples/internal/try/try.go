// Package try runs the example programs in their own tests: a test binary starts
// itself again as the program.
package try

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// env is set in the environment of a test binary that runs as the program.
const env = "ACCEPTQ_TEST_EXAMPLE"

// Be runs main and ends the process if it was started by [Program]. A TestMain
// calls it first.
func Be(main func()) {
	if os.Getenv(env) != "" {
		main()
		os.Exit(0)
	}
}

// Program returns a command that runs the program with args. It is killed after 30 s.
func Program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	return command(t, self, args...)
}

func command(t *testing.T, name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env+"=1",
		"GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0") // otherwise the race detector waits for a second at exit
	return cmd
}

// WithDescriptors returns the program under a limit of n descriptors.
func WithDescriptors(t *testing.T, n int, args ...string) *exec.Cmd {
	t.Helper()
	if runtime.GOOS == "windows" || runtime.GOOS == "js" || runtime.GOOS == "wasip1" {
		t.Skip("no ulimit on this system")
	}
	self, err := os.Executable()
	if err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	script := fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, n)
	return command(t, "/bin/sh", append([]string{"-c", script, self}, args...)...)
}

// Fails runs cmd and requires that it ends with the status, after one line on
// standard error that begins with the program's name and contains each of says. It
// returns the program's standard output, unless cmd has a standard output already.
func Fails(t *testing.T, cmd *exec.Cmd, status int, program string, says ...string) (stdout string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stderr = &errs
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != status {
		t.Errorf("%v: ended with %v, not with status %d; its standard error is %q", cmd.Args[1:], err, status, &errs)
	}
	line, rest, _ := strings.Cut(errs.String(), "\n")
	if rest != "" || !strings.HasPrefix(line, program+": ") {
		t.Errorf("%v: standard error is not one line that begins with the program's name: %q", cmd.Args[1:], &errs)
	}
	for _, s := range says {
		if !strings.Contains(line, s) {
			t.Errorf("%v: %q does not contain %q", cmd.Args[1:], line, s)
		}
	}
	return out.String()
}

// Misused requires that the program rejects these arguments with status 2 and one line
// that contains says.
func Misused(t *testing.T, program, says string, args ...string) {
	t.Helper()
	if out := Fails(t, Program(t, args...), 2, program, says); out != "" {
		t.Errorf("%v: it wrote output before it failed: %q", args, out)
	}
}

// BadAddresses requires that the program fails with a one-line message if its -addr is
// in use or is not an address.
func BadAddresses(t *testing.T, program string, args ...string) {
	t.Helper()
	for _, host := range []string{"127.0.0.1", "::1"} {
		ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Logf("cannot listen on %s: %v", host, err)
			continue
		}
		defer ln.Close()
		addr := ln.Addr().String()
		Fails(t, Program(t, append(args, "-addr", addr)...), 1, program, addr, "bind: ")
	}
	for addr, says := range map[string]string{"nowhere": "nowhere", "::1:0": "::1:0", "127.0.0.1:65536": "65536"} {
		Fails(t, Program(t, append(args, "-addr", addr)...), 1, program, says)
	}
}

// ClosedPipe requires that the program fails with a one-line message if the reader of
// its output has gone.
func ClosedPipe(t *testing.T, program string, args ...string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Skipf("no pipe on this system: %v", err)
	}
	r.Close()
	defer w.Close()
	cmd := Program(t, args...)
	cmd.Stdout = w
	Fails(t, cmd, 1, program, "write")
}

// HasIPv6 reports whether this host can listen on ::1.
func HasIPv6() bool {
	ln, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		return false
	}
	ln.Close()
	return true
}
