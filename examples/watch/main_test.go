package main

import (
	"bufio"
	"bytes"
	"io"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	try.Be(main)
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := try.Program(t, args...)
	cmd.Stderr = os.Stderr
	return cmd
}

func TestProgramEndsAfterItsTime(t *testing.T) {
	var out bytes.Buffer
	cmd := program(t, "-for", "1100ms", "-backlog", "3")
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	require.NoError(t, cmd.Wait())
	require.Contains(t, out.String(), "backlog: asked 3")
	require.Contains(t, out.String(), " served, ")
	require.NotContains(t, out.String(), "\x1b", "no terminal, no control sequences")
	if _, err := acceptq.ReadSystem(); err != nil {
		require.Contains(t, out.String(), "does not report")
	}
}

// A run that is shorter than the time between two looks has looked once.
func TestShortRun(t *testing.T) {
	out, err := program(t, "-for", "50ms", "-backlog", "3").Output()
	if err != nil && len(out) == 0 {
		t.Skipf("this system cannot start a program: %v", err)
	}
	require.NoError(t, err)
	if _, err := acceptq.ReadSystem(); err == nil {
		require.NotContains(t, string(out), "does not report")
		require.Regexp(t, `maximum \d+ queued of`, string(out))
	}
}

func TestProgramEndsOnSIGINT(t *testing.T) {
	cmd := program(t)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	if err := cmd.Start(); err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "   1s") {
	}
	require.NoError(t, lines.Err())
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		require.NoError(t, cmd.Process.Kill())
		cmd.Wait()
		t.Skipf("this system sends no SIGINT: %v", err)
	}
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	require.Contains(t, string(rest), " served, ")
	require.NoError(t, cmd.Wait(), "exit status 0")
}

func TestLine(t *testing.T) {
	clamped := acceptq.Backlog{Requested: 4096, Limit: 32}
	var v view
	v.look(acceptq.Stats{Queued: 3, Limit: 32, Capacity: 33, Drops: math.MaxUint32})
	require.Equal(t, " 3 queued of 33 (limit 32)   9%, drops   0/s", v.line(acceptq.Backlog{}))
	v.look(acceptq.Stats{Queued: 33, Limit: 32, Capacity: 33, Drops: 6})
	require.Equal(t, "33 queued of 33 (limit 32) 100%, drops   7/s, FULL, clamped: asked 4096", v.line(clamped))
	require.Equal(t, "maximum 33 queued of 33, full for 50% of the time, 7 packets dropped", v.summary())
	for range looks {
		v.look(acceptq.Stats{Queued: 0, Limit: 32, Capacity: 33, Drops: 6})
	}
	require.Equal(t, " 0 queued of 33 (limit 32)   0%, drops   0/s", v.line(acceptq.Backlog{}), "a second has passed")

	v = view{}
	v.look(acceptq.Stats{Queued: 2, Limit: 5, Capacity: 8, Drops: -1})
	require.Equal(t, "2 queued of 8 (limit 5)  25%, drops unknown", v.line(acceptq.Backlog{}))
	require.Equal(t, "maximum 2 queued of 8, full for 0% of the time, drops unknown", v.summary())
	v.look(acceptq.Stats{Queued: -1, Limit: -1, Capacity: -1, Drops: -1})
	require.Contains(t, v.line(acceptq.Backlog{}), "does not report")
	require.Contains(t, v.bar(acceptq.Backlog{}), "does not report")
	require.Contains(t, v.summary(), "does not report")

	v = view{}
	v.look(acceptq.Stats{Queued: 31, Limit: 128, Capacity: 129, Drops: -1})
	v.look(acceptq.Stats{Queued: -1, Limit: 128, Capacity: 129, Drops: -1})
	require.Equal(t, "more queued than this system reports, of 129 (limit 128), drops unknown", v.line(acceptq.Backlog{}))
	require.Equal(t, v.line(acceptq.Backlog{}), v.bar(acceptq.Backlog{}))
	v.look(acceptq.Stats{Queued: 2, Limit: 128, Capacity: 129, Drops: -1})
	require.Contains(t, v.line(acceptq.Backlog{}), "  2 queued of 129")
	require.Equal(t, "maximum unknown: more queued than this system reports for 33% of the time", v.summary())
}

func TestBlocks(t *testing.T) {
	for part, want := range map[float64]string{
		0: "    ", 0.5: "██  ", 1: "████", 1.5: "████", 1.0 / 32: "▏   ", 31.0 / 32: "███▉", 0.33: "█▍  ",
	} {
		require.Equal(t, want, blocks(part, 4))
	}
	for i := range 1000 {
		require.Equal(t, 24, utf8.RuneCountInString(blocks(float64(i)/900, 24)))
	}
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "watch", `"10s"`, "10s")
	try.Misused(t, "watch", "-for", "-for", "-1s")
	try.BadAddresses(t, "watch")
	try.ClosedPipe(t, "watch")
}

func TestIPv6(t *testing.T) {
	if !try.HasIPv6() {
		t.Skip("no IPv6 on this host")
	}
	out, err := program(t, "-addr", "[::1]:0", "-for", "1ns").Output()
	require.NoError(t, err)
	require.Contains(t, string(out), "listening on [::1]:")
}
