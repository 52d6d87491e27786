//go:build linux

package main

import (
	"testing"

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

// The drawing made by hand can be read too, and its dark form is up to date.
func TestQueues(t *testing.T) { picturetest.Drawing(t, "../docs/queues") }
