//go:build linux

package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The text between these two lines of the page is written by this program.
const (
	begin = "<!-- written by: go run -C bench ./overload -draw -->\n"
	end   = "<!-- end of what is written -->\n"
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
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	f := &figures{meta: map[string]string{}, values: map[key][]float64{}}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 0 && strings.HasSuffix(fields[0], ":") {
			f.meta[strings.TrimSuffix(fields[0], ":")] = strings.Join(fields[1:], " ")
			continue
		}
		if len(fields) < 4 || len(fields)%2 != 0 {
			return nil, fmt.Errorf("%s: %q is no benchmark line", name, line)
		}
		var k key
		for part := range strings.SplitSeq(fields[0], "/") {
			switch field, value, _ := strings.Cut(part, "="); field {
			case "server":
				k.server = value
			case "load":
				if k.load, err = strconv.ParseFloat(value, 64); err != nil {
					return nil, fmt.Errorf("%s: %w", name, err)
				}
			}
		}
		for i := 2; i < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			k.unit = fields[i+1]
			f.values[k] = append(f.values[k], value)
		}
	}
	if len(f.values) == 0 {
		return nil, fmt.Errorf("%s: no figures", name)
	}
	return f, nil
}

// spread returns the median, the minimum and the maximum of the rounds. ok is false if
// the figure was not measured.
func (f *figures) spread(server string, load float64, unit string) (median, least, most float64, ok bool) {
	v := slices.Sorted(slices.Values(f.values[key{server, load, unit}]))
	if len(v) == 0 {
		return math.NaN(), math.NaN(), math.NaN(), false
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1], true
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
	median, least, most, ok := f.spread(server, load, unit)
	if !ok {
		return "none"
	}
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
	fmt.Fprintf(&b, "![Good answers a second by the load, for %d servers](overload.svg)\n\n", len(servers))
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
	section("Time to a good answer, 99th percentile", "p99-ns")
	section("Answers 503 a second", "turned-away/s")
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
		if median, _, _, ok := f.spread(s.name, load, "good/s"); ok {
			parts = append(parts, fmt.Sprintf("%s %.0f %%", s.title, 100*median/capacity))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return fmt.Sprintf("With %v times as many clients as the server can answer, it gave this part of its capacity as good answers: %s.\n\n",
		load, strings.Join(parts, "; "))
}

// between replaces the text between the two lines of a page.
func between(name, text string) error {
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, begun := strings.Cut(string(old), begin)
	_, after, ended := strings.Cut(rest, end)
	if !begun || !ended {
		return fmt.Errorf("%s must have the lines %q and %q", name, begin, end)
	}
	return os.WriteFile(name, []byte(before+begin+"\n"+text+"\n"+end+after), 0o666)
}

const style = `<style>
text { font: 12px Helvetica, Arial, 'Liberation Sans', sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: bold }
.end { text-anchor: end }
.middle { text-anchor: middle }
.panel { fill: #f6f8fa; stroke: #d1d9e0 }
.grid { stroke: #d1d9e0; stroke-width: 1 }
polyline { fill: none }
line, polyline { stroke-width: 2 }
.long { stroke: #cf222e } .short { stroke: #bf8700 } .shed { stroke: #0969da } .adapt { stroke: #1a7f37 } .context { stroke: #818b98 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.panel { fill: #151b23; stroke: #3d444d }
.grid { stroke: #3d444d }
.long { stroke: #f85149 } .short { stroke: #d29922 } .shed { stroke: #4493f8 } .adapt { stroke: #3fb950 } .context { stroke: #7d8590 }
}
</style>
`

// picture draws the good answers by load, with a line for each server. The names are in
// a list below, so that no two texts overlap.
func (f *figures) picture() []byte {
	const width, left, right, top, bottom = 880, 70, 30, 60, 340
	const height = bottom + 60 + 20*5 + 10
	x := func(load float64) float64 { return left + (width-left-right)*load/slices.Max(loads) }
	most := capacity * 1.1
	y := func(good float64) float64 { return bottom - (bottom-top)*good/most }
	var b strings.Builder
	text := func(px, py float64, class, s string) {
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">%s</text>\n", px, py, class, html.EscapeString(s))
	}
	line := func(x1, y1, x2, y2 float64, class string) {
		fmt.Fprintf(&b, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" class=\"%s\"/>\n", x1, y1, x2, y2, class)
	}
	title := "Good answers a second above the capacity of a server"
	about := fmt.Sprintf("A good answer comes within %v, before the client gives up. The server can give %.0f a second.", patience, capacity)
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" aria-labelledby="title desc">
<title id="title">%s</title>
<desc id="desc">%s</desc>
%s<rect class="panel" x=".5" y=".5" width="%d" height="%d" rx="10"/>
`, width, height, width, height, title, about, style, width-1, height-1)
	text(20, 34, "title", title)
	for part := 0.0; part <= 1; part += 0.25 {
		line(left, y(part*capacity), width-right, y(part*capacity), "grid")
		text(left-8, y(part*capacity)+4, "end", fmt.Sprintf("%.0f", part*capacity))
	}
	for _, load := range loads {
		line(x(load), bottom, x(load), bottom+5, "grid")
		text(x(load), bottom+20, "middle", fmt.Sprintf("%v ×", load))
	}
	text((left+width-right)/2, bottom+40, "middle", "clients that come, of the capacity; each tries up to "+strconv.Itoa(tries)+" times")
	for i, s := range servers {
		var points []string
		for _, load := range loads {
			median, least, most, ok := f.spread(s.name, load, "good/s")
			if !ok {
				continue
			}
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(load), y(median)))
			line(x(load), y(least), x(load), y(most), s.name)
		}
		fmt.Fprintf(&b, "<polyline class=\"%s\" points=\"%s\"/>\n", s.name, strings.Join(points, " "))
		row := float64(bottom + 64 + 20*i)
		line(left, row-4, left+30, row-4, s.name)
		text(left+40, row, "", s.title)
	}
	return []byte(b.String() + "</svg>\n")
}
