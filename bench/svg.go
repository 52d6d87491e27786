//go:build linux

package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/perf/benchmath"
)

const (
	pictureWidth = 880
	margin       = 20
	rowHeight    = 20
	charWidth    = 6.4 // more than the mean width of a character of 12 px
)

const style = `<style>
text { font: 12px Helvetica, Arial, 'Liberation Sans', sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: bold }
.end { text-anchor: end }
.panel { fill: #f6f8fa; stroke: #d1d9e0 }
line { stroke: #59636e }
.ours { fill: #0969da }
.others { fill: #818b98 }
.lost { fill: #cf222e }
.late { fill: #bf8700 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.panel { fill: #151b23; stroke: #3d444d }
line { stroke: #9da5ae }
.ours { fill: #4493f8 }
.others { fill: #7d8590 }
.lost { fill: #f85149 }
.late { fill: #d29922 }
}
</style>
`

// A bar is one row of a panel. Its parts follow each other from left to right.
type bar struct {
	parts  []float64
	inks   []string          // classes of the style sheet
	text   string            // the text after the bar
	median benchmath.Summary // its interval is drawn, if there is one
}

// A panel has a title and one bar for each row of its picture. All bars start at
// 0, or with a logarithmic scale at a power of ten below the shortest.
type panel struct {
	title string
	bars  []bar
	log   bool
}

// scale returns the length of a value, as a share of the longest bar.
func (p panel) scale() func(float64) float64 {
	low, high := math.Inf(1), 0.0
	for _, b := range p.bars {
		sum := 0.0
		for _, v := range b.parts {
			sum += v
			low = min(low, v)
		}
		high = max(high, sum)
		if !math.IsInf(b.median.Hi, 0) && !p.log {
			high = max(high, b.median.Hi)
		}
	}
	if p.log {
		low = math.Floor(math.Log10(low) - 0.5)
		return func(v float64) float64 { return (math.Log10(max(v, 1)) - low) / (math.Log10(high) - low) }
	}
	return func(v float64) float64 { return v / max(high, 1e-9) }
}

func width(text string) float64 { return float64(utf8.RuneCountInString(text)) * charWidth }

// picture draws panels with the same rows side by side. Each text gets room in
// proportion to its length, so that no two texts overlap.
func picture(title, about string, rows []string, panels ...panel) []byte {
	names := 0.0
	for _, row := range rows {
		names = max(names, width(row))
	}
	share := (pictureWidth - 2*margin - names) / float64(len(panels))
	top := 0.0
	for _, p := range panels {
		top = max(top, 62+15*float64(len(wrap(p.title, share-12))))
	}
	notes := wrap(about, pictureWidth-2*margin)
	bottom := top + float64(len(rows)*rowHeight)
	height := bottom + float64(len(notes)*16) + margin
	var b strings.Builder
	text := func(x, y float64, class, s string) {
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">%s</text>\n", x, y, class, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%.0f" viewBox="0 0 %d %.0f" role="img" aria-labelledby="title desc">
<title id="title">%s</title>
<desc id="desc">%s</desc>
%s<rect class="panel" x=".5" y=".5" width="%d" height="%.0f" rx="10"/>
`, pictureWidth, height, pictureWidth, height, html.EscapeString(title), html.EscapeString(about), style, pictureWidth-1, height-1)
	text(margin, 34, "title", title)
	for i, row := range rows {
		text(margin+names, top+float64(i)*rowHeight+14, "end", row)
	}
	for i, note := range notes {
		text(margin, bottom+20+float64(i)*16, "", note)
	}
	for k, p := range panels {
		behind := 0.0
		for _, bar := range p.bars {
			behind = max(behind, width(bar.text))
		}
		left := margin + names + float64(k)*share + 12
		span, scale := share-12-8-behind, p.scale()
		heads := wrap(p.title, share-12)
		for j, head := range heads {
			text(left, top-8-15*float64(len(heads)-1-j), "", head)
		}
		fmt.Fprintf(&b, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", left, left, top, bottom)
		for i, bar := range p.bars {
			y, end := top+float64(i)*rowHeight, 0.0
			for j, v := range bar.parts {
				x := left + span*scale(end)
				if end == 0 {
					x = left
				}
				end += v
				fmt.Fprintf(&b, "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"12\"/>\n", bar.inks[j], x, y+4, max(0, left+span*scale(end)-x))
			}
			if s := bar.median; s.Lo < s.Hi && !math.IsInf(s.Lo, 0) && !p.log {
				fmt.Fprintf(&b, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", left+span*scale(s.Lo), left+span*scale(s.Hi), y+10, y+10)
				end = max(end, s.Hi)
			}
			text(left+span*scale(end)+6, y+14, "", bar.text)
		}
	}
	return []byte(b.String() + "</svg>\n")
}

// wrap breaks a text into lines that fit into a width.
func wrap(s string, most float64) (lines []string) {
	line := ""
	for _, word := range strings.Fields(s) {
		if line != "" && width(line+" "+word) > most {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimSpace(line + " " + word)
	}
	return append(lines, line)
}

// bars makes a bar of the figures of each row.
func bars(rows []string, unit string, loss bool, figures func(row string) []float64) (all []bar) {
	for _, row := range rows {
		v, ink := figures(row), "others"
		if strings.HasPrefix(row, ours) {
			ink = "ours"
		}
		s := summarize(v)
		b := bar{[]float64{s.Center}, []string{ink}, format(s.Center, unit), s}
		if len(v) == 0 {
			b.parts = nil
		} else if loss {
			b.text += " (worst " + format(slices.Max(v), unit) + ")"
		}
		all = append(all, b)
	}
	return all
}

// drawAll draws four pictures.
func drawAll(dir string) error {
	burst := func(title, unit string, loss bool) panel {
		return panel{title: title, bars: bars(names(bursts), unit, loss, func(row string) []float64 { return samples("Burst", row, unit) })}
	}
	restart := func(title, bench string) panel {
		p := panel{title: title}
		for _, row := range names(restarts) {
			lost, stalled := samples(bench, row, "lost"), samples(bench, row, "stalled")
			if len(lost) == 0 || len(stalled) == 0 {
				p.bars = append(p.bars, bar{text: "unknown"})
				continue
			}
			a, b := summarize(lost).Center, summarize(stalled).Center
			p.bars = append(p.bars, bar{parts: []float64{a, b}, inks: []string{"lost", "late"}, text: fmt.Sprintf("%s + %s (%s + %s)",
				digits(a), digits(b), digits(slices.Max(lost)), digits(slices.Max(stalled)))})
		}
		return p
	}
	speed := func(title, bench string) panel {
		return panel{title: title, bars: bars(peerNames, "×", false, func(row string) []float64 {
			return ratios(samples(bench, row, cpu), samples(bench, netDefault, cpu))
		})}
	}
	var reads []panel
	for _, size := range readSizes {
		reads = append(reads, panel{title: "with " + strconv.Itoa(size) + " sockets", log: true,
			bars: bars(readerNames, "ns", false, func(row string) []float64 { return samples(readBench(size), row, "ns/op") })})
	}
	for file, svg := range map[string][]byte{
		"burst.svg": picture("5,000 clients at once: who is let in, and how long the others wait",
			"The server is stopped for 0.5 s; net.core.somaxconn is 128. At once: no packet was retransmitted. No client gives up. Medians with 95 % intervals.",
			names(bursts), burst("Clients let in at once", "at-once", false), burst("Time to the first byte, p99", p99, true)),
		"restart.svg": picture("A restart under load: requests lost and clients stalled",
			"Red: requests that were refused or reset. Yellow: requests that were stalled by a retransmission. Medians; the worst restart in brackets. "+
				"Wait: until every accepted connection has had its first answer. ¹ Needs a parent process or socket activation. ² A sysctl, needs root.",
			names(restarts), restart("64 clients that never rest", "Restart/clients=busy"), restart("64 clients that rest for about 20 ms", "Restart/clients=calm")),
		"speed.svg": picture("CPU time as a multiple of net.Listen's",
			"The second row is net.Listen again, to show the noise. Medians with 95 % intervals. The times of net/http include the clients.",
			peerNames, speed("Listen on 127.0.0.1:0", "Listen/addr=literal"), speed("Listen on :0", "Listen/addr=wildcard"), speed("Accept", "Accept"), speed("net/http, 1 request", "HTTP")),
		"read.svg": picture("Reading one accept queue", "Time of one reading, with other TCP sockets. Logarithmic scales. Medians.", readerNames, reads...),
	} {
		measured := slices.ContainsFunc(measurements, func(m *measurement) bool { return m.svg == file && m.ran() > 0 })
		if !measured {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, file), svg, 0o666); err != nil {
			return err
		}
	}
	return nil
}
