//go:build !plan9

package main

import (
	"os"
	"testing"

	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	try.Be(main)
	os.Exit(m.Run())
}

func TestProgram(t *testing.T) {
	addrs := map[string]string{"tcp": "127.0.0.1:", "tcp4": "127.0.0.1:"}
	if try.HasIPv6() {
		addrs["tcp6"] = "[::1]:"
	}
	for network, addr := range addrs {
		out, err := try.Program(t, "-network", network, "-addr", addr+"0").Output()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "listening on "+addr)
		require.Contains(t, string(out), "backlog: asked 2")
		require.Contains(t, string(out), " queued, the next ")
	}
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "backlog", `"8"`, "8")
	try.Misused(t, "backlog", `"more"`, "-network", "tcp4", "more", "-backlog", "8")
	for _, network := range []string{"udp", "unix", "tcp5", ""} {
		try.Misused(t, "backlog", "-network", "-network", network)
	}
	try.BadAddresses(t, "backlog")
	try.ClosedPipe(t, "backlog")
}

// A client that failed for lack of a descriptor does not count as one that did not get in.
func TestFewDescriptors(t *testing.T) {
	cmd := try.WithDescriptors(t, 40, "-backlog", "100")
	out := try.Fails(t, cmd, 1, "backlog", "too many open files")
	require.NotContains(t, out, " queued")
}
