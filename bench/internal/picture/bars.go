package picture

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

const rowHeight = 20

// A Bar shows the median of some rounds as its length and as a number, and a line from
// the smallest round to the largest. The scale goes to twice the longest bar at most; a
// line that is longer ends in an arrow. Without rounds the Bar shows the words "not
// measured".
type Bar struct {
	Rounds []float64
	Ink    Ink
}

// A Panel has a bar for each row of its picture. With Log it has a logarithmic scale,
// and points instead of bars, because a bar must begin at 0.
type Panel struct {
	Title  string // with line breaks
	Bars   []Bar
	Log    bool
	Format func(float64) string // of a number
}

// Bars is a picture whose panels stand side by side. With Shared they have one scale.
type Bars struct {
	Title  string
	Notes  []string
	Rows   []string
	Panels []Panel
	Shared bool
}

// Spread returns the median, the smallest and the largest value. Without values all are
// NaN.
func Spread(values []float64) (median, least, most float64) {
	if len(values) == 0 {
		return math.NaN(), math.NaN(), math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1]
}

// limits returns the largest and the smallest value of the panel, and its longest bar.
func (p Panel) limits(rows []string) (least, most, longest float64, err error) {
	if len(p.Bars) != len(rows) {
		return 0, 0, 0, fmt.Errorf("panel %q: %d bars for %d rows", p.Title, len(p.Bars), len(rows))
	}
	least = math.Inf(1)
	for i, b := range p.Bars {
		for _, v := range b.Rounds {
			if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 || v == 0 && p.Log {
				return 0, 0, 0, fmt.Errorf("panel %q, row %q: %v cannot be drawn", p.Title, rows[i], v)
			}
		}
		if len(b.Rounds) > 0 {
			median, low, high := Spread(b.Rounds)
			least, most, longest = min(least, low), max(most, high), max(longest, median)
		}
	}
	return least, most, longest, nil
}

// Draw returns the light form of the picture.
func (c Bars) Draw() ([]byte, error) {
	heads := 0
	plots := make([]*plot.Plot, len(c.Panels))
	longest := make([]float64, len(c.Panels))
	all := 0.0 // the longest bar of all panels
	for i, p := range c.Panels {
		least, most, long, err := p.limits(c.Rows)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Title, err)
		}
		heads = max(heads, len(split(p.Title)))
		all = max(all, long)
		longest[i] = long
		plots[i] = p.plot(c.Rows, i == 0, least, most)
	}
	if c.Shared {
		low, high := plots[0].X.Min, plots[0].X.Max
		for _, p := range plots {
			low, high = min(low, p.X.Min), max(high, p.X.Max)
		}
		for i, p := range plots {
			p.X.Min, p.X.Max, longest[i] = low, high, all
		}
	}
	for i, p := range plots {
		// Otherwise one round sets the scale, and every bar is too short to be compared.
		if !c.Panels[i].Log && longest[i] > 0 {
			p.X.Max = min(p.X.Max, 2*longest[i])
		}
	}
	s := newSheet(c.Title, c.Notes, vg.Length(heads*lead+len(c.Rows)*rowHeight)+38)
	canvases := s.columns(plots, vg.Length(heads)*lead)
	for i, p := range plots {
		canvas := canvases[i]
		p.Draw(canvas)
		data := p.DataCanvas(canvas)
		for j, line := range split(c.Panels[i].Title) {
			s.page.FillText(style(12, body, true), vg.Point{X: data.Min.X, Y: s.top - vg.Length(j+1)*lead + 4}, line)
		}
	}
	return s.bytes()
}

// columns divides the width between plots, so that their bars have the same room: less for
// a plot without names, more for one with long numbers. plot.Align does the same, but
// fails if the names need more than their share.
func (s sheet) columns(plots []*plot.Plot, heads vg.Length) []draw.Canvas {
	const gap = 14
	all := draw.Crop(s.page, margin, -margin, s.bottom+8, s.top-s.height-heads)
	n := vg.Length(len(plots))
	widths := make([]vg.Length, len(plots))
	for i := range widths {
		widths[i] = (all.Max.X - all.Min.X - gap*(n-1)) / n
	}
	canvases := make([]draw.Canvas, len(plots))
	for range 20 { // each time nearer to equal
		left, sum := all.Min.X, vg.Length(0)
		room := make([]vg.Length, len(plots))
		for i, p := range plots {
			canvases[i] = all
			canvases[i].Min.X, canvases[i].Max.X = left, left+widths[i]
			data := p.DataCanvas(canvases[i])
			if room[i] = data.Max.X - data.Min.X; !(room[i] > 0) { // NaN if a number does not fit beside the names
				room[i] = 0
			}
			sum += room[i]
			left += widths[i] + gap
		}
		for i := range widths {
			widths[i] += sum/n - room[i]
		}
	}
	return canvases
}

// plot draws the bars. The first row is at the top.
func (p Panel) plot(rows []string, names bool, least, most float64) *plot.Plot {
	q := plot.New()
	q.BackgroundColor = nil
	small := style(11, muted, false)
	if most == 0 { // nothing to draw
		least, most = 1, 1
	}
	q.X.Min, q.X.Max, q.X.Padding = 0, most, 0
	q.X.Tick.Label, q.X.Tick.Length, q.X.LineStyle.Width = small, 0, 0
	q.X.Tick.Label.XAlign, q.X.Tick.Label.YAlign = draw.XCenter, draw.YTop
	q.X.Tick.Marker = ticks{plot.DefaultTicks{}, p.Format}
	if p.Log {
		q.X.Min, q.X.Scale = math.Pow(10, math.Floor(math.Log10(least))), plot.LogScale{}
		q.X.Max = max(most, 10*q.X.Min)
		q.X.Tick.Marker = ticks{plot.LogTicks{}, p.Format}
	}
	q.Y.Min, q.Y.Max, q.Y.Padding = -float64(len(rows))+0.5, 0.5, 0
	q.Y.Tick.Length, q.Y.LineStyle.Width = 0, 1
	q.Y.LineStyle.Color = Others
	q.Y.Tick.Label = style(12, body, false)
	q.Y.Tick.Label.XAlign, q.Y.Tick.Label.YAlign = draw.XRight, draw.YCenter
	var labels []plot.Tick
	for i, row := range rows {
		if !names {
			row = ""
		}
		labels = append(labels, plot.Tick{Value: -float64(i), Label: row + "  "}) // not next to the bar
	}
	q.Y.Tick.Marker = plot.ConstantTicks(labels)
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Vertical.Dashes, grid.Horizontal.Width = border, nil, 0
	q.Add(grid)
	for i, b := range p.Bars {
		q.Add(mark{b, p, -float64(i)})
	}
	return q
}

// ticks are those of plot, with numbers in another format. Of many, every second one has
// a number.
type ticks struct {
	plot.Ticker
	format func(float64) string
}

func (t ticks) Ticks(low, high float64) (major []plot.Tick) {
	for _, tick := range t.Ticker.Ticks(low, high) {
		if tick.Label != "" && tick.Value >= low && tick.Value <= high {
			major = append(major, plot.Tick{Value: tick.Value, Label: t.format(tick.Value)})
		}
	}
	for i := 1; len(major) > 4 && i < len(major); i += 2 {
		major[i].Label = " " // an empty label would make it a minor tick
	}
	return major
}

// A mark draws the bar of one row, its line and its number.
type mark struct {
	Bar
	Panel
	y float64
}

// text returns the words behind the bar and the place where they start. The largest
// round is among the words if it is beyond the scale.
func (m mark) text(p *plot.Plot) (words string, at float64) {
	if len(m.Rounds) == 0 {
		return "not measured", p.X.Min
	}
	median, _, most := Spread(m.Rounds)
	words = m.Format(median)
	if most > p.X.Max {
		words += " (to " + m.Format(most) + ")"
	}
	return words, min(most, p.X.Max)
}

func (m mark) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	words, at := m.text(p)
	c.FillText(m.label(), vg.Point{X: x(at) + 7, Y: y(m.y) + 2}, words)
	if len(m.Rounds) == 0 {
		return
	}
	median, least, most := Spread(m.Rounds)
	if !m.Log && median > 0 {
		end := max(x(median), x(0)+1) // so that it differs from 0
		c.FillPolygon(m.Ink, []vg.Point{{X: x(0), Y: y(m.y) - 6}, {X: end, Y: y(m.y) - 6}, {X: end, Y: y(m.y) + 6}, {X: x(0), Y: y(m.y) + 6}})
	}
	if least < most {
		line := draw.LineStyle{Color: body, Width: 1.5}
		left, right := x(least), x(min(most, p.X.Max))
		c.StrokeLine2(line, left, y(m.y), right, y(m.y))
		c.StrokeLine2(line, left, y(m.y)-3, left, y(m.y)+3)
		if most > p.X.Max { // an arrow
			c.FillPolygon(body, []vg.Point{{X: right + 3, Y: y(m.y)}, {X: right - 5, Y: y(m.y) - 4}, {X: right - 5, Y: y(m.y) + 4}})
		} else {
			c.StrokeLine2(line, right, y(m.y)-3, right, y(m.y)+3)
		}
	}
	if m.Log { // above the line, which can be shorter
		c.DrawGlyph(draw.GlyphStyle{Color: m.Ink, Radius: 4, Shape: draw.CircleGlyph{}}, vg.Point{X: x(median), Y: y(m.y)})
	}
}

func (m mark) label() draw.TextStyle {
	s := style(12, body, false)
	s.YAlign = draw.YCenter
	return s
}

// GlyphBoxes reserves room for the number.
func (m mark) GlyphBoxes(p *plot.Plot) []plot.GlyphBox {
	words, at := m.text(p)
	box := m.label().Rectangle(words).Add(vg.Point{X: 9})
	return []plot.GlyphBox{{X: p.X.Norm(at), Y: p.Y.Norm(m.y), Rectangle: box}}
}

func split(title string) []string { return strings.Split(title, "\n") }
