//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/acceptq/acceptq/bench/internal/picture"
	"golang.org/x/perf/benchfmt"
)

// A key is one figure: a server, a load and a unit.
type key struct {
	server string
	load   float64
	unit   string
}

// figures are the results of all rounds.
type figures struct {
	meta   map[string]string
	values map[key][]float64
}

// read reads the results of a run.
func read(name string) (*figures, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	f := &figures{meta: map[string]string{}, values: map[key][]float64{}}
	lines := benchfmt.NewReader(file, name)
	for lines.Scan() {
		line, ok := lines.Result().(*benchfmt.Result)
		if !ok {
			return nil, fmt.Errorf("%s: %v", name, lines.Result())
		}
		for _, c := range line.Config {
			f.meta[c.Key] = string(c.Value)
		}
		var k key
		_, parts := line.Name.Parts()
		for _, part := range parts {
			switch field, value, _ := strings.Cut(string(part), "="); field {
			case "/server":
				k.server = value
			case "/load":
				if k.load, err = strconv.ParseFloat(value, 64); err != nil {
					return nil, fmt.Errorf("%s: %w", name, err)
				}
			}
		}
		for _, v := range line.Values {
			k.unit = v.Unit
			if v.OrigUnit != "" { // the reader makes seconds of ns
				v.Value, k.unit = v.OrigValue, v.OrigUnit
			}
			f.values[k] = append(f.values[k], v.Value)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(f.values) == 0 {
		return nil, fmt.Errorf("%s: no figures", name)
	}
	return f, nil
}

// rounds returns the number of rounds.
func (f *figures) rounds() (n int) {
	for _, v := range f.values {
		n = max(n, len(v))
	}
	return n
}

// cell writes the median, and the minimum and maximum if they differ.
func (f *figures) cell(server string, load float64, unit string) string {
	rounds := f.values[key{server, load, unit}]
	if len(rounds) == 0 {
		return "none"
	}
	median, least, most := picture.Spread(rounds)
	write := func(v float64) string {
		if unit == "p99-ns" {
			return time.Duration(v).Round(time.Millisecond).String()
		}
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	if write(least) == write(most) {
		return write(median)
	}
	return write(median) + " (" + write(least) + " to " + write(most) + ")"
}

// table returns the measured part of the page.
func (f *figures) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", picture.Link("overload", fmt.Sprintf("Good answers a second by the load, for %d servers.", len(servers))))
	b.WriteString(f.summary())
	section := func(title, unit string) {
		fmt.Fprintf(&b, "**%s**\n\n| clients that come, of the capacity |", title)
		rule := "\n| ---"
		for _, s := range servers {
			b.WriteString(" " + s.title + " |")
			rule += " | ---"
		}
		b.WriteString(rule + " |\n")
		for _, load := range loads {
			fmt.Fprintf(&b, "| %v × |", load)
			for _, s := range servers {
				b.WriteString(" " + f.cell(s.name, load, unit) + " |")
			}
			b.WriteString("\n")
		}
		b.WriteString("\n")
	}
	section(fmt.Sprintf("Good answers a second, of %.0f that the server can give", capacity), "good/s")
	rounds := "One round, so nothing says how much the figures vary."
	if n := f.rounds(); n > 1 {
		rounds = fmt.Sprintf("Median of %d rounds, with minimum and maximum.", n)
	}
	fmt.Fprintf(&b, "%s %s, commit %s; %s; load average before the run %s.",
		rounds, f.meta["date"], f.meta["commit"], f.meta["machine"], f.meta["load"])
	if f.meta["short"] != "" {
		b.WriteString(" This was a short run, whose figures are worth nothing.")
	}
	return b.String() + "\n"
}

// summary describes the figures at one load above the capacity in one sentence.
func (f *figures) summary() string {
	const load = 1.5
	var parts []string
	for _, s := range servers {
		if rounds := f.values[key{s.name, load, "good/s"}]; len(rounds) > 0 {
			median, _, _ := picture.Spread(rounds)
			parts = append(parts, fmt.Sprintf("%s %.0f %%", s.title, 100*median/capacity))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return fmt.Sprintf("With %v times as many clients as the server can answer, it gave this part of its capacity as good answers: %s.\n\n",
		load, strings.Join(parts, "; "))
}

// inks are the colors of the servers' lines.
var inks = map[string]picture.Ink{"long": picture.Red, "short": picture.Yellow, "shed": picture.Ours, "adapt": picture.Green, "context": picture.Others}

// picture draws the good answers by load, with a line for each server.
func (f *figures) picture() ([]byte, error) {
	title, rounds := "one round", "Each point is one round: nothing says how much the figures vary."
	if n := f.rounds(); n > 1 {
		title, rounds = fmt.Sprintf("%d rounds", n), "Each point is the median of the rounds. Its line goes from the smallest to the largest."
	}
	p := picture.Lines{
		Title: "Good answers of a server that gets more clients than it can serve: " + title,
		Notes: []string{fmt.Sprintf("A good answer comes within %.0f s, before the client gives up. The server can give %.0f a second. Each client tries up to %d times.", patience.Seconds(), capacity, tries),
			rounds},
		X:  "new clients, as a multiple of those that the server can serve",
		Y:  "good answers a second",
		At: loads, FormatAt: func(load float64) string { return fmt.Sprintf("%v ×", load) },
		Top: capacity * 1.1,
	}
	for _, s := range servers {
		line := picture.Series{Name: s.title, Ink: inks[s.name]}
		for _, load := range loads {
			line.Points = append(line.Points, picture.Point{X: load, Rounds: f.values[key{s.name, load, "good/s"}]})
		}
		p.AllSeries = append(p.AllSeries, line)
	}
	return p.Draw()
}
