//go:build !plan9

package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	try.Be(main)
	os.Exit(m.Run())
}

func TestNoneIsLost(t *testing.T) {
	for _, n := range []int{1, 3} {
		var out bytes.Buffer
		o, err := stall(bufio.NewWriter(&out), "127.0.0.1:0", n, 64, 12)
		if n > 1 && errors.Is(err, errors.ErrUnsupported) {
			continue
		}
		require.NoError(t, err)
		require.Equal(t, 12, o.in)
		require.Contains(t, out.String(), "12 of 12 got in")
		require.Contains(t, out.String(), "12 served, none lost")
		if len(o.queues) > 0 {
			require.Len(t, o.queues, n)
			require.Equal(t, n, strings.Count(out.String(), "· "), "one bar for each shard: %s", &out)
		}
	}
}

// The kernel does not let in more clients than the queue holds.
func TestFullQueue(t *testing.T) {
	var out bytes.Buffer
	o, err := stall(bufio.NewWriter(&out), "127.0.0.1:0", 1, 4, 12)
	require.NoError(t, err)
	if len(o.queues) == 0 {
		return // this system reports no queue, and may have a longer one
	}
	require.Contains(t, out.String(), " did not")
	require.Less(t, o.in, 12)
}

func TestNoShards(t *testing.T) {
	require.Error(t, run(io.Discard, "127.0.0.1:0", 0, 128, 1))
	require.Error(t, run(io.Discard, "nowhere", 1, 128, 1))
}

func TestProgram(t *testing.T) {
	addrs := []string{"127.0.0.1:"}
	if try.HasIPv6() {
		addrs = append(addrs, "[::1]:")
	}
	for _, addr := range addrs {
		out, err := try.Program(t, "-n", "1", "-clients", "3", "-addr", addr+"0").Output()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "1 shard on "+addr)
		require.Contains(t, string(out), "3 of 3 got in")
	}
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "shards", `"16"`, "16")
	for _, n := range []string{"0", "-1"} {
		try.Misused(t, "shards", "-n "+n, "-n", n)
		try.Misused(t, "shards", "-clients "+n, "-clients", n)
	}
	try.BadAddresses(t, "shards", "-n", "1")
	try.ClosedPipe(t, "shards", "-n", "1", "-clients", "1")
}

// A client that failed for lack of a descriptor does not count as one that did not get in, and a
// server without descriptors does not count its clients as lost.
func TestFewDescriptors(t *testing.T) {
	cmd := try.WithDescriptors(t, 60, "-n", "1", "-clients", "300")
	out := try.Fails(t, cmd, 1, "shards", "too many open files")
	require.NotContains(t, out, " did not")

	// How many clients leave none for the server depends on the runtime's own descriptors.
	failed := 0
	for clients := 40; clients <= 58; clients += 2 {
		out, err := try.WithDescriptors(t, 60, "-n", "1", "-clients", strconv.Itoa(clients)).CombinedOutput()
		if err != nil {
			require.Contains(t, string(out), "too many open files")
			failed++
		}
		require.NotContains(t, string(out), " did not")
		require.NotContains(t, string(out), "that got in were lost")
	}
	require.NotZero(t, failed)
}
