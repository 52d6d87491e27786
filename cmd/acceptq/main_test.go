package main

import (
	"bytes"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// command runs the command and returns its exit status and output.
func command(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), style{}, args, &out, &errs)
	return status, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"-h"}, {"-help"}, {"--help"}, {"help"}, {"check", "-h"}, {"who", "-h"}} {
		status, stdout, stderr := command(t, args...)
		require.Equal(t, statusOK, status)
		require.Equal(t, usage, stdout)
		require.Empty(t, stderr)
	}
	for line := range strings.Lines(usage) {
		require.LessOrEqual(t, len(line), 93, line)
	}
	for _, args := range [][]string{
		{"-x"}, {"nonsense"}, {"", "x"}, {"-w", "x"}, {"who"}, {"who", "a", "b"}, {"who", "nowhere"}, {"waiting", ":0"}, {"waiting"},
		{"check", "-for", "soon"}, {"check", "-for", "-1s"}, {"check", "x"}, {"check", "-w"}, {"check", "-n"}, {"who", "-all", ":80"},
	} {
		status, stdout, stderr := command(t, args...)
		require.Equal(t, statusUnknown, status, args)
		require.Empty(t, stdout)
		require.True(t, strings.HasPrefix(stderr, "acceptq: ") && strings.HasSuffix(stderr, ": run acceptq -h for help\n"), stderr)
	}
}

// On a system that does not list the queues the command says so, and does not report that all
// is well.
func TestUnsupported(t *testing.T) {
	if runtime.GOOS == "linux" {
		t.Skip("Linux lists the queues")
	}
	for _, args := range [][]string{nil, {"-json"}, {"-all"}, {"check"}, {"who", ":80"}, {"waiting", ":80"}} {
		status, stdout, stderr := command(t, args...)
		require.Equal(t, statusUnknown, status, args)
		require.Empty(t, stdout)
		require.Contains(t, stderr, "acceptq: unsupported on "+runtime.GOOS+": ")
	}
}
