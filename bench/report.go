//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/acceptq/acceptq/bench/internal/picture"
	"golang.org/x/perf/benchfmt"
	"golang.org/x/perf/benchmath"
	"golang.org/x/sys/unix"
)

func git(args ...string) (string, error) {
	out, err := exec.Command("git", args...).Output()
	return strings.TrimSpace(string(out)), err
}

// describe says which code is measured, when and on which machine.
func describe() string {
	commit, err := git("rev-parse", "--short=9", "HEAD")
	if err != nil {
		commit = "unknown"
	}
	if changes, err := git("status", "--porcelain", "--", ":/*.go", ":/go.mod"); err == nil && changes != "" {
		commit += " with changes"
	}
	var u unix.Utsname
	unix.Uname(&u)
	kernel, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-") // the rest names the builder
	retry, err := os.ReadFile("/proc/sys/net/ipv4/tcp_syn_linear_timeouts")
	if err != nil {
		retry = []byte("unknown")
	}
	return fmt.Sprintf("commit: %s\ndate: %s\nmachine: %d cores, Linux %s, %s\ntcp_syn_linear_timeouts: %s\n",
		commit, time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), kernel, runtime.Version(), strings.TrimSpace(string(retry)))
}

// load returns the load average of the last minute.
func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	one, _, _ := strings.Cut(string(text), " ")
	return one
}

// read reads results. If there are none, all figures are unknown.
func (m *measurement) read(file string) error {
	m.meta, m.figures = map[string]string{}, map[string][]float64{}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	lines := benchfmt.NewReader(f, file)
	for lines.Scan() {
		switch line := lines.Result().(type) {
		case *benchfmt.SyntaxError:
			return line
		case *benchfmt.Result:
			for _, c := range line.Config {
				if c.Key == "load" && m.meta["load"] != "" { // keep the first and the last
					first, _, _ := strings.Cut(m.meta["load"], " ")
					m.meta["load"] = first + " to " + string(c.Value)
					continue
				}
				m.meta[c.Key] = string(c.Value)
			}
			name := regexp.MustCompile(`-\d+$`).ReplaceAllString(string(line.Name.Full()), "") // GOMAXPROCS
			for _, v := range line.Values {
				if v.OrigUnit != "" { // the reader makes seconds of ns
					v.Value, v.Unit = v.OrigValue, v.OrigUnit
				}
				m.figures[name+" "+v.Unit] = append(m.figures[name+" "+v.Unit], v.Value)
			}
		}
	}
	return lines.Err()
}

// slug is the form of a row in the name of a benchmark, which cannot contain "/" or " ".
func slug(row string) string { return strings.NewReplacer(" ", "_", "/", "|").Replace(row) }

// samples finds the figures of a row, one for each round. None means unknown.
func samples(bench, row, unit string) []float64 {
	for _, m := range measurements {
		if v := m.figures[bench+"/with="+slug(row)+" "+unit]; v != nil {
			return v
		}
	}
	return nil
}

// outdated says why a result may not apply to the current code. It returns "" if the
// measured code has not changed since.
func (m *measurement) outdated() string {
	commit, dirty, _ := strings.Cut(m.meta["commit"], " ")
	args := []string{"diff", "--name-only", commit, "--"}
	for _, name := range strings.Fields(m.code) {
		args = append(args, ":(top,glob)"+name)
	}
	changed, err := git(append(args, ":(top,exclude,glob)**/*_test.go")...)
	switch {
	case err != nil:
		return "commit " + commit + " is not in this repository"
	case changed != "":
		files := strings.Fields(changed)
		if len(files) > 4 {
			return fmt.Sprintf("%d of its files changed since", len(files))
		}
		return strings.Join(files, ", ") + " changed since"
	case dirty != "":
		return "measured with changes that were not committed"
	}
	return ""
}

func sample(values []float64) *benchmath.Sample {
	return benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds)
}

// center gives the median. It is NaN if nothing was measured.
func center(values []float64) float64 {
	median, _, _ := picture.Spread(values)
	return median
}

// ratios divides the rounds of a by those of b; nil if that cannot be done.
func ratios(a, b []float64) (all []float64) {
	if len(a) != len(b) || slices.Contains(b, 0) {
		return nil
	}
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return all
}

// A verdict says whether a goal is met.
type verdict string

const (
	holds      verdict = "holds"
	fallsShort verdict = "missed"
	undecided  verdict = "undecided" // the difference is not significant
	unknown    verdict = "unknown"   // not measured
)

// atMost judges whether the values of own are at most factor times those of base.
// It is decided only if a Mann-Whitney U test finds, at the 5 % level, that own and
// the scaled base differ.
func atMost(own []float64, factor float64, base []float64) verdict {
	if len(own) == 0 || len(base) == 0 {
		return unknown
	}
	bound := slices.Clone(base)
	for i := range bound {
		bound[i] *= factor
	}
	c := benchmath.AssumeNothing.Compare(sample(own), sample(bound))
	switch a, b := center(own), center(bound); {
	case c.P >= c.Alpha || a == b:
		return undecided
	case a < b:
		return holds
	}
	return fallsShort
}

// never judges whether all values are 0, so a single round with a loss counts. If the
// control lost nothing either, the load was too low, and the verdict is undecided.
func never(values, control []float64) verdict {
	switch {
	case len(values) == 0 || len(control) == 0:
		return unknown
	case slices.Max(values) > 0:
		return fallsShort
	case slices.Max(control) == 0:
		return undecided
	}
	return holds
}

// format writes a number with the unit that ends the name of a benchmark's unit:
// ns is a time, B a size, × a ratio; all others are counts.
func format(v float64, unit string) string {
	type scale struct {
		size float64
		name string
	}
	scales := []scale{{0, ""}}
	switch unit = strings.TrimSuffix(unit, "/op"); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "unknown"
	case v == 0:
		return "0"
	case strings.HasSuffix(unit, "ns"):
		scales = []scale{{1e9, " s"}, {1e6, " ms"}, {1e3, " µs"}, {0, " ns"}}
	case strings.HasSuffix(unit, "B"):
		scales = []scale{{1 << 20, " MiB"}, {1 << 13, " KiB"}, {0, " B"}}
	case unit == "×":
		scales[0].name = " ×"
	}
	i := slices.IndexFunc(scales, func(s scale) bool { return math.Abs(v) >= s.size })
	return digits(v/max(1, scales[i].size)) + scales[i].name
}

// digits writes three significant digits, or all digits of a whole number.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v) || a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a < 0.1:
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// cell writes the median and, in brackets, the smallest and the largest round if they
// differ.
func cell(values []float64, unit string) string {
	median, least, most := picture.Spread(values)
	text := format(median, unit)
	if low, high := format(least, unit), format(most, unit); low != high {
		text += " (" + low + " to " + high + ")"
	}
	return text
}
