package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNoneIsLost(t *testing.T) {
	for _, n := range []int{1, 3} {
		var out bytes.Buffer
		o, err := stall(&out, "127.0.0.1:0", n, 64, 12)
		if n > 1 && errors.Is(err, errors.ErrUnsupported) {
			continue
		}
		require.NoError(t, err)
		require.Equal(t, 12, o.in)
		require.Contains(t, out.String(), "12 of 12 got in")
		require.Contains(t, out.String(), "12 served, none of them was lost")
		if len(o.queues) > 0 {
			require.Len(t, o.queues, n)
			require.Equal(t, n, strings.Count(out.String(), "· "), "as many bars: %s", &out)
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
