//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestGoals passes figures that meet the goals, miss them, are undecided, and are
// missing. Each goal must be able to have each verdict.
func TestGoals(t *testing.T) {
	steady := func(v float64) []float64 {
		return []float64{v, v * 1.001, v * 1.002, v * 1.003, v * 1.004, v * 1.005, v * 1.006, v * 1.007}
	}
	noisy := func(v float64) []float64 {
		return []float64{v / 3, v / 2, v, v * 2, v * 3, v / 1.5, v * 1.5, v * 1.1}
	}
	zeros, once := make([]float64, 8), []float64{0, 0, 0, 0, 0, 0, 0, 300} // one bad round of eight
	for _, q := range []struct {
		verdict       verdict
		own, base     []float64
		p99, none     []float64
		stats, others []float64
	}{
		{holds, steady(50), steady(100), steady(500e6), zeros, steady(1), steady(1000)},
		{fallsShort, steady(200), steady(100), steady(900e6), once, steady(500), steady(1000)},
		{undecided, noisy(100), noisy(97), noisy(600e6), zeros, noisy(20), noisy(1000)},
		{unknown, nil, steady(100), nil, nil, nil, steady(1000)},
	} {
		figures := map[string][]float64{}
		set := func(bench, row, unit string, v []float64) { figures[bench+"/with="+slug(row)+" "+unit] = v }
		for _, bench := range []string{"Listen/addr=literal", "Listen/addr=wildcard", "Accept", "HTTP"} {
			set(bench, ours, cpu, q.own)
			set(bench, netDefault, cpu, q.base)
			set(bench, netPlain, cpu, q.base)
		}
		set("Burst", manyQueues, p99, q.p99)
		control := once
		if q.verdict == undecided { // the control lost nothing
			control = zeros
		}
		set("Burst", manyQueues, "stalled", q.none)
		set("Burst", oneQueue, "stalled", control)
		for _, bench := range []string{restartBench(1, "busy"), restartBench(1, "calm"), restartBench(3, "busy")} {
			for _, row := range []string{restartDrain, restartServe} {
				set(bench, row, "lost", q.none)
				set(bench, row, "stalled", q.none)
			}
			set(bench, restartShutdown, "lost", control)
			set(bench, restartUnsteered, "stalled", control)
			set(bench, restartShutdown, "refused", q.none)
			set(bench, restartNet, "refused", control)
		}
		for _, protocol := range []string{"http1", "h2-tls", "h2c"} {
			set(keptBench(protocol), restartServe, "lost", q.none)
			set(keptBench(protocol), restartShutdown, "lost", control)
		}
		for i, size := range readSizes {
			set(readBench(size), readerNames[4], "ns/op", q.others)
			set(readBench(size), readStats, "ns/op", q.stats)
			if i == 0 && q.verdict == fallsShort { // slower with more sockets
				set(readBench(size), readStats, "ns/op", steady(1))
			}
			if i == 0 && q.verdict == holds {
				set(readBench(size), readStats, "ns/op", steady(1.2))
			}
		}
		measurements[0].figures = figures
		for _, g := range goals() {
			if g.verdict != q.verdict {
				t.Errorf("%s: %s: %s, want %s", g.text, g.figure, g.verdict, q.verdict)
			}
		}
	}
	measurements[0].figures = nil
}

// TestWorst shows that no summary hides the one round with a loss.
func TestWorst(t *testing.T) {
	if got := cell([]float64{0, 0, 0, 0, 0, 0, 0, 300}, "lost"); got != "0 (0 to 300)" {
		t.Error(got)
	}
}

// TestOutdated shows that a figure is marked as outdated if the measured code changes,
// and not if other code does.
func TestOutdated(t *testing.T) {
	t.Chdir(t.TempDir())
	commit := func(file, text string) string {
		if err := os.WriteFile(file, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "t"}} {
			if out, err := git(args...); err != nil {
				t.Fatal(args, out, err)
			}
		}
		hash, err := git("rev-parse", "HEAD")
		if err != nil {
			t.Fatal(err)
		}
		return hash
	}
	m := &measurement{code: "drain*.go", meta: map[string]string{"commit": commit("drain.go", "1")}}
	if why := m.outdated(); why != "" {
		t.Errorf("nothing changed: %s", why)
	}
	commit("stats.go", "1")
	commit("drain_test.go", "1")
	if why := m.outdated(); why != "" {
		t.Errorf("other code changed: %s", why)
	}
	commit("drain_linux.go", "1")
	if why := m.outdated(); why != "drain_linux.go changed since" || m.mark() == "" {
		t.Errorf("drain_linux.go changed: %q", why)
	}
	for _, hash := range []string{m.meta["commit"] + " with changes", "0123456789"} {
		m.meta["commit"], m.code = hash, "none.go"
		if m.outdated() == "" {
			t.Errorf("commit %s: no mark", hash)
		}
	}
}

// TestCode requires that the measured files of each figure exist. Otherwise no change
// could mark the figure as outdated.
func TestCode(t *testing.T) {
	for _, m := range measurements {
		for _, name := range strings.Fields(m.code) {
			if files, err := filepath.Glob("../" + name); err != nil || len(files) == 0 {
				t.Errorf("%s: %s matches no file (%v)", m.name, name, err)
			}
		}
	}
}
