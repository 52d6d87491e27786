//go:build linux

package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// A Report is all that one run found.
type Report struct {
	Machine Machine   `json:"machine"`
	Results []*Result `json:"results"`
}

// A Result is what one measurement found.
type Result struct {
	Name   string  `json:"name"`
	Title  string  `json:"title"`
	Rounds int     `json:"rounds"`
	Load   string  `json:"load"` // of the machine, before and after
	Tables []Table `json:"tables"`
	Goals  []Goal  `json:"goals,omitempty"`
}

// A Table has one row for each thing that was measured.
type Table struct {
	Name    string   `json:"name"`
	Title   string   `json:"title"`
	Columns []Column `json:"columns"`
	Rows    []Row    `json:"rows"`
	Note    string   `json:"note,omitempty"`
}

// A Column is a quantity; the unit is one of those that Summary.format knows.
type Column struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
}

// A Row is one thing and its figures; one that is unknown is nil.
type Row struct {
	Label string     `json:"label"`
	Cells []*Summary `json:"cells"`
}

// A Summary is the median of the samples and the quartiles around it.
type Summary struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
	N      int     `json:"n"`
}

// A Goal is what was aimed at, and what came of it.
type Goal struct {
	Text   string `json:"text"`
	Figure string `json:"figure"`
	Holds  bool   `json:"holds"`
}

// Machine is where the figures come from.
type Machine struct {
	Cores  int    `json:"cores"`
	CPU    string `json:"cpu"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Short  bool   `json:"short,omitempty"` // nothing below is worth anything
}

func thisMachine(c config) Machine {
	m := Machine{Cores: runtime.NumCPU(), CPU: runtime.GOARCH, Go: runtime.Version(), Short: c.short}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		// What follows the number names who built it.
		m.Kernel, _, _ = strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
		m.Kernel = "Linux " + m.Kernel
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(model)
				break
			}
		}
	}
	return m
}

// load is how many wanted a core in the last minute, of all that the machine runs.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(text), " ")
	return one
}

func (m Machine) String() string {
	s := fmt.Sprintf("%d cores (%s), %s, %s", m.Cores, m.CPU, m.Kernel, m.Go)
	if m.Short {
		s += "; a short run, whose figures are worth nothing"
	}
	return s
}

// summarize sorts samples. Those that are NaN are left out.
func summarize(samples []float64) *Summary {
	samples = slices.DeleteFunc(slices.Clone(samples), math.IsNaN)
	if len(samples) == 0 {
		return nil
	}
	slices.Sort(samples)
	return &Summary{quantile(samples, 0.5), quantile(samples, 0.25), quantile(samples, 0.75), len(samples)}
}

// quantile of sorted samples, with a straight line between two of them.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// ratios divides sample by sample, so that each round is compared with itself.
func ratios(a, b []float64) []float64 {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	return r
}

// interleave runs each of n things once a round, and begins each round with
// another. The first round warms up and has the number -1.
func interleave(c config, n int, run func(round, i int) error) error {
	for round := -1; round < c.rounds; round++ {
		for k := range n {
			i := (round + 1 + k) % n
			if err := run(round, i); err != nil {
				return err
			}
		}
	}
	return nil
}

// samples has one slice for each of n things, with room for each round.
func newSamples(n, rounds int) [][]float64 {
	s := make([][]float64, n)
	for i := range s {
		s[i] = make([]float64, rounds)
	}
	return s
}

// row finds a row by its label.
func (t *Table) row(label string) *Row {
	for i := range t.Rows {
		if t.Rows[i].Label == label {
			return &t.Rows[i]
		}
	}
	return nil
}

// cell finds a figure; nil if there is none.
func (t *Table) cell(label, column string) *Summary {
	row := t.row(label)
	i := slices.IndexFunc(t.Columns, func(c Column) bool { return c.Name == column })
	if row == nil || i < 0 {
		return nil
	}
	return row.Cells[i]
}

func (r *Report) table(result, name string) *Table {
	for _, res := range r.Results {
		if res.Name != result {
			continue
		}
		for i := range res.Tables {
			if res.Tables[i].Name == name {
				return &res.Tables[i]
			}
		}
	}
	return nil
}

// format writes one number in a unit: "ns" and "ms" are times as they are stored,
// "×" is a ratio, "B" bytes, and "" a count.
func format(v float64, unit string) string {
	switch unit {
	case "ns":
		for _, u := range []struct {
			name string
			size float64
		}{{"s", 1e9}, {"ms", 1e6}, {"µs", 1e3}} {
			if v >= u.size {
				return digits(v/u.size) + " " + u.name
			}
		}
		return digits(v) + " ns"
	case "ms":
		return format(v*1e6, "ns")
	case "B":
		switch {
		case v >= 1<<20:
			return digits(v/(1<<20)) + " MiB"
		case v >= 10<<10:
			return digits(v/(1<<10)) + " KiB"
		}
		return strconv.FormatFloat(v, 'f', 0, 64) + " B"
	case "×":
		if v < 10 {
			return strconv.FormatFloat(v, 'f', 3, 64)
		}
		return digits(v)
	}
	return digits(v)
}

// digits writes three digits that count, or all of a whole number.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v) || a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func (s *Summary) format(unit string) string {
	if s == nil {
		return "unknown"
	}
	m, low, high := format(s.Median, unit), format(s.Low, unit), format(s.High, unit)
	if low == high {
		return m
	}
	return fmt.Sprintf("%s (%s to %s)", m, low, high)
}

func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintln(&b, r.Machine)
	for _, res := range r.Results {
		b.WriteString(res.String())
	}
	return b.String()
}

func (r *Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s\n%s\nMedians of %d rounds and their quartiles; the machine's load was %s.\n", r.Title, strings.Repeat("=", utf8.RuneCountInString(r.Title)), r.Rounds, r.Load)
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "\n%s\n", t.Title)
		w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
		fmt.Fprint(w, "  ")
		for _, c := range t.Columns {
			fmt.Fprintf(w, "\t%s", c.Name)
		}
		fmt.Fprintln(w)
		for _, row := range t.Rows {
			fmt.Fprintf(w, "  %s", row.Label)
			for i, cell := range row.Cells {
				fmt.Fprintf(w, "\t%s", cell.format(t.Columns[i].Unit))
			}
			fmt.Fprintln(w)
		}
		w.Flush()
		if t.Note != "" {
			fmt.Fprintf(&b, "  (%s)\n", t.Note)
		}
	}
	if len(r.Goals) > 0 {
		fmt.Fprintln(&b)
	}
	for _, g := range r.Goals {
		word := "falls short"
		if g.Holds {
			word = "holds"
		}
		fmt.Fprintf(&b, "  goal: %s: %s: %s\n", g.Text, g.Figure, word)
	}
	return b.String()
}
