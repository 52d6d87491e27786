//go:build !plan9

package main

import (
	"bufio"
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
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

func TestPicture(t *testing.T) {
	file := filepath.Join(t.TempDir(), "shards.svg")
	var out bytes.Buffer
	err := run(&out, "127.0.0.1:0", 3, 4, 12, file)
	if errors.Is(err, errors.ErrUnsupported) {
		return
	}
	require.NoError(t, err)
	require.Contains(t, out.String(), "were turned away", "by one listener with a backlog of 4")
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	bars := 0
	for d := xml.NewDecoder(bytes.NewReader(text)); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "rect" {
			bars++
		}
	}
	require.Equal(t, 1+1+3, bars, "the panel and a bar for each queue")
}

func TestNoShards(t *testing.T) {
	require.Error(t, run(io.Discard, "127.0.0.1:0", 0, 128, 1, ""))
	require.Error(t, run(io.Discard, "nowhere", 1, 128, 1, ""))
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
	nowhere := filepath.Join(t.TempDir(), "no", "such", "folder.svg")
	cmd := try.Program(t, "-n", "1", "-clients", "1", "-svg", nowhere)
	try.Fails(t, cmd, 1, "shards")
}

// A client that failed for lack of a descriptor does not count as turned away, and a
// server without descriptors does not count its clients as lost.
func TestFewDescriptors(t *testing.T) {
	cmd := try.WithDescriptors(t, 60, "-n", "1", "-clients", "300")
	out := try.Fails(t, cmd, 1, "shards", "too many open files")
	require.NotContains(t, out, "turned away")

	// How many clients leave none for the server depends on the runtime's own descriptors.
	failed := 0
	for clients := 40; clients <= 58; clients += 2 {
		out, err := try.WithDescriptors(t, 60, "-n", "1", "-clients", strconv.Itoa(clients)).CombinedOutput()
		if err != nil {
			require.Contains(t, string(out), "too many open files")
			failed++
		}
		require.NotContains(t, string(out), "turned away")
		require.NotContains(t, string(out), "that got in were lost")
	}
	require.NotZero(t, failed)
}
