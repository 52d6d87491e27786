//go:build linux

package main

import (
	"bytes"
	"os"
	"testing"

	"github.com/acceptq/acceptq/bench/internal/picture"
	"github.com/acceptq/acceptq/bench/internal/picture/picturetest"
)

// The committed pictures are those of the committed results, and can be read.
func TestCommittedPictures(t *testing.T) {
	for _, m := range measurements {
		if err := m.read(m.file("results")); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, m := range measurements {
			m.meta, m.figures = nil, nil
		}
	}()
	for _, m := range measurements {
		if m.picture == "" || m.ran() == 0 {
			continue
		}
		svg, err := pictures[m.picture](m.ran()).Draw()
		if err != nil {
			t.Error(err)
			continue
		}
		picturetest.Committed(t, "results/"+m.picture, svg)
	}
}

// The dark form of the drawing made by hand is up to date.
func TestQueues(t *testing.T) {
	light, err := os.ReadFile("../docs/queues.svg")
	if err != nil {
		t.Fatal(err)
	}
	dark, err := os.ReadFile("../docs/queues-dark.svg")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dark, picture.Dark(light)) {
		t.Error("docs/queues-dark.svg is older than docs/queues.svg: run go run -C bench . -draw")
	}
}
