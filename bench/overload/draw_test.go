//go:build linux

package main

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq/bench/internal/picture/picturetest"
)

const sample = `date: 2026-01-02
commit: abc
machine: Linux 6.18, 2 CPUs, go1.26
load: 0.1 0.2 0.3
BenchmarkOverload/server=long/load=2 1 10.0 good/s 800.0 came/s 4.0 turned-away/s 5 worked
BenchmarkOverload/server=long/load=2 1 30.0 good/s 800.0 came/s 4.0 turned-away/s 400000000 p50-ns 980400000 p99-ns 5 worked
BenchmarkOverload/server=shed/load=2 1 390.0 good/s 500600000 p99-ns
BenchmarkOverload/server=short/load=1.5 1 300.0 good/s
`

func stored(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "overload.txt")
	if err := os.WriteFile(name, []byte(text), 0o666); err != nil {
		t.Fatal(err)
	}
	return name
}

// The page has the measured figures, and "none" for missing ones.
func TestTable(t *testing.T) {
	f, err := read(stored(t, sample))
	if err != nil {
		t.Fatal(err)
	}
	text := f.table()
	for _, want := range []string{
		"| 2 × | 20 (10 to 30) | none | 390 | none | none |",
		"| 0.5 × | none | none | none | none | none |", "good answers: short queue 75 %.\n",
		"Median of 2 rounds", "2026-01-02, commit abc; Linux 6.18, 2 CPUs, go1.26; load average before the run 0.1 0.2 0.3.",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, "worth nothing") {
		t.Error("a full run is marked as a short run")
	}
	if f.meta["short"] = "yes"; !strings.Contains(f.table(), "worth nothing") {
		t.Error("a short run is not marked")
	}
}

// The picture has all names, and figures that the server cannot reach are an error.
func TestPicture(t *testing.T) {
	f, err := read(stored(t, sample))
	if err != nil {
		t.Fatal(err)
	}
	svg, err := f.picture()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		if !bytes.Contains(svg, []byte(">"+s.title+"<")) {
			t.Errorf("%q has no line in the list", s.title)
		}
	}
	f.values[key{"long", 2, "good/s"}] = []float64{math.Inf(1)}
	if _, err := f.picture(); err == nil {
		t.Error("an infinite figure was drawn")
	}
}

// The committed picture is that of the committed figures.
func TestCommitted(t *testing.T) {
	f, err := read("../results/overload.txt")
	if err != nil {
		t.Fatal(err)
	}
	svg, err := f.picture()
	if err != nil {
		t.Fatal(err)
	}
	picturetest.Committed(t, "../../docs/overload", svg)
}

func TestWrongResults(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":       "",
		"no value":      "BenchmarkOverload/server=long/load=2 1 10.0\n",
		"no number":     "BenchmarkOverload/server=long/load=2 1 x good/s\n",
		"a wrong load":  "BenchmarkOverload/server=long/load=x 1 1 good/s\n",
		"another text":  "PASS\n",
		"only metadata": "date: today\n",
	} {
		if _, err := read(stored(t, text)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// There is a standing queue if no client waited for less than the target during a whole
// interval.
func TestStanding(t *testing.T) {
	var s standing
	at := time.Unix(1000, 0)
	for i, step := range []struct {
		after  time.Duration
		waited time.Duration
		stands bool
	}{
		{0, 10 * target, false}, // the first interval has not ended
		{budget / 2, 10 * target, false},
		{budget + 1, 10 * target, true},    // a standing queue in the first interval
		{budget + 2, target / 2, true},     // until this one ends
		{2*budget + 2, 10 * target, false}, // a client was accepted at once in this interval
		{3*budget + 3, target + 1, true},   // a standing queue again
		{4*budget + 4, target, true},       // and still, up to this time
		{5*budget + 5, 10 * target, false},
	} {
		if got := s.stands(at.Add(step.after), step.waited); got != step.stands {
			t.Errorf("step %d: %v", i, got)
		}
	}
}
