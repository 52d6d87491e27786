//go:build linux

package main

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A tint is a colour on a light page and what it becomes on a dark one.
type tint struct {
	light color.NRGBA
	dark  string
}

var (
	inkText   = tint{rgb(0x1f2328), "#f0f6fc"}
	inkMute   = tint{rgb(0x59636e), "#9da5ae"}
	inkGrid   = tint{rgb(0xd8dee4), "#2f353d"}
	inkOthers = tint{rgb(0x818b98), "#7d8590"}
	inkOurs   = tint{rgb(0x0969da), "#4493f8"}
	inkLost   = tint{rgb(0xcf222e), "#f85149"}
	inkLate   = tint{rgb(0xbf8700), "#d29922"}
)

func rgb(v uint32) color.NRGBA {
	return color.NRGBA{uint8(v >> 16), uint8(v >> 8), uint8(v), 0xff}
}

// drawAll draws a picture of each measurement that there is.
func drawAll(r *Report, dir string) error {
	for _, p := range []struct {
		file string
		draw func(*Report) *picture
	}{
		{"speed.svg", drawSpeed},
		{"queue.svg", drawQueue},
		{"burst.svg", drawBurst},
		{"restart.svg", drawRestart},
	} {
		if pic := p.draw(r); pic != nil {
			if err := os.WriteFile(filepath.Join(dir, p.file), pic.svg(), 0o666); err != nil {
				return err
			}
		}
	}
	return nil
}

const (
	pictureWidth = 760
	margin       = 20
	headline     = 58 // the title and the line below it
	barRow       = 22
	axisHeight   = 40
)

// A picture is a canvas with a title. Its unit is the pixel of an SVG.
type picture struct {
	canvas *vgsvg.Canvas
	height vg.Length
	title  string
	about  string
}

func newPicture(height vg.Length, title, about string) *picture {
	p := &picture{vgsvg.New(pictureWidth, height), height, title, about}
	all := draw.New(p.canvas)
	left := vg.Length(margin)
	all.FillText(face(15, inkText, true, draw.XLeft, draw.YTop), vg.Point{X: left, Y: height - margin + 4}, title)
	all.FillText(face(12, inkMute, false, draw.XLeft, draw.YTop), vg.Point{X: left, Y: height - margin - 19}, about)
	return p
}

// area is a part of a picture, from its top left corner.
func (p *picture) area(x, y, width, height vg.Length) draw.Canvas {
	return draw.Canvas{Canvas: p.canvas, Rectangle: vg.Rectangle{
		Min: vg.Point{X: x, Y: p.height - y - height},
		Max: vg.Point{X: x + width, Y: p.height - y},
	}}
}

func face(size vg.Length, ink tint, bold bool, x text.XAlignment, y text.YAlignment) text.Style {
	f := font.From(plot.DefaultFont, size)
	f.Variant = "Sans"
	if bold {
		f.Weight = 2 // semi-bold and bold are one to gonum
	}
	return text.Style{Color: ink.light, Font: f, XAlign: x, YAlign: y, Handler: plot.DefaultTextHandler}
}

// svg is the picture as a file: on a panel of its own, with what a screen reader
// says of it, and with other colours on a dark page.
func (p *picture) svg() []byte {
	var b bytes.Buffer
	p.canvas.WriteTo(&b)
	s := b.String()
	_, body, _ := strings.Cut(s, "<g") // the head is written anew
	var head strings.Builder
	fmt.Fprintf(&head, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%g" viewBox="0 0 %d %g" role="img" aria-labelledby="title desc">
<title id="title">%s</title>
<desc id="desc">%s</desc>
<style>
.panel { fill: #f6f8fa; stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
.panel { fill: #151b23; stroke: #3d444d }
`, pictureWidth, p.height.Points(), pictureWidth, p.height.Points(), p.title, p.about)
	for _, ink := range []tint{inkText, inkMute, inkGrid, inkOthers, inkOurs, inkLost, inkLate} {
		light := fmt.Sprintf("#%02X%02X%02X", ink.light.R, ink.light.G, ink.light.B)
		fmt.Fprintf(&head, "[style*=\"fill:%s\"] { fill: %s !important }\n[style*=\"stroke:%s\"] { stroke: %s !important }\n", light, ink.dark, light, ink.dark)
	}
	fmt.Fprintf(&head, "}\n</style>\n<rect class=\"panel\" x=\".5\" y=\".5\" width=\"%d\" height=\"%g\" rx=\"10\"/>\n<g", pictureWidth-1, p.height.Points()-1)
	// Liberation Sans has the widths of Helvetica and Arial, and few have it.
	body = strings.NewReplacer(
		"font-family:Liberation Sans", "font-family:Helvetica,Arial,'Liberation Sans',sans-serif",
		"font-variant:none;", "", "font-style:normal;", "",
	).Replace(body)
	return []byte(head.String() + body)
}

// newPlot is axes without ornaments.
func newPlot() *plot.Plot {
	p := plot.New()
	p.BackgroundColor = nil
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.LineStyle.Color = inkMute.light
		a.LineStyle.Width = 0.8
		a.Tick.LineStyle.Color = inkMute.light
		a.Tick.LineStyle.Width = 0.8
		a.Tick.Length = 4
		a.Padding = 0
		a.Label.TextStyle = face(12, inkMute, false, draw.XCenter, draw.YBottom)
		a.Tick.Label = face(11, inkMute, false, draw.XCenter, draw.YTop)
	}
	p.Y.Tick.Label.XAlign, p.Y.Tick.Label.YAlign = draw.XRight, draw.YCenter
	return p
}

// A bar is one row: its parts stand one behind the other.
type bar struct {
	label string
	parts []part
	text  string
}

type part struct {
	value float64
	ink   tint
}

// bars draws rows from the top down, on an axis that begins at 0.
type bars struct {
	title string
	rows  []bar
	whole float64 // the end of the axis
}

func (b bars) DataRange() (xmin, xmax, ymin, ymax float64) {
	return 0, b.whole, -0.5, float64(len(b.rows)) - 0.5
}

func (b bars) at(i int) float64 { return float64(len(b.rows) - 1 - i) }

func (b bars) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	headPanel(c, b.title)
	gridX(c, p)
	const half = barRow * 0.3
	for i, row := range b.rows {
		at, mid := 0.0, y(b.at(i))
		for _, part := range row.parts {
			from, to := x(at), x(at+part.value)
			at += part.value
			if to > from {
				c.FillPolygon(part.ink.light, []vg.Point{{X: from, Y: mid - half}, {X: to, Y: mid - half}, {X: to, Y: mid + half}, {X: from, Y: mid + half}})
			}
		}
		c.FillText(face(11, inkText, false, draw.XLeft, draw.YCenter), vg.Point{X: x(at) + 5, Y: mid}, row.text)
	}
}

// headPanel writes a title above the plot itself, without the names beside it.
func headPanel(c draw.Canvas, title string) {
	c.FillText(face(12, inkText, false, draw.XLeft, draw.YBottom), vg.Point{X: c.Min.X, Y: c.Max.Y + 5}, title)
}

// gridX draws a line at each tick that has a number.
func gridX(c draw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	for _, t := range p.X.Tick.Marker.Ticks(p.X.Min, p.X.Max) {
		if !t.IsMinor() {
			c.StrokeLine2(draw.LineStyle{Color: inkGrid.light, Width: 0.8}, x(t.Value), c.Min.Y, x(t.Value), c.Max.Y)
		}
	}
}

// barPlot is rows of bars with the names of the rows before them. The room for
// what stands behind the longest bar is a part of the axis.
func barPlot(title, axis string, rows []bar, whole float64, ticks []plot.Tick) *plot.Plot {
	p := newPlot()
	b := bars{title, rows, whole}
	p.Add(b)
	p.X.Label.Text = axis
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	nameRows(p, b.at, labels(rows))
	return p
}

func labels(rows []bar) (all []string) {
	for _, r := range rows {
		all = append(all, r.label)
	}
	return all
}

func nameRows(p *plot.Plot, at func(int) float64, names []string) {
	var ticks []plot.Tick
	for i, name := range names {
		ticks = append(ticks, plot.Tick{Value: at(i), Label: name})
	}
	p.Y.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Tick.Length = 0
	p.Y.Tick.Label = face(12, inkText, false, draw.XRight, draw.YCenter)
	p.Y.Padding = 0
	p.Y.LineStyle.Width = 0 // the grid has a line at 0
	p.Y.Min, p.Y.Max = -0.5, float64(len(names))-0.5
}

// ticks are round numbers from 0 on, about so many up to most.
func ticks(most float64, about int, unit string, scale float64) (all []plot.Tick) {
	step := math.Pow(10, math.Floor(math.Log10(most/float64(about))))
	for _, m := range []float64{1, 2, 5, 10} {
		if most/(step*m) <= float64(about) {
			step *= m
			break
		}
	}
	for v := 0.0; v <= most*1.0001; v += step {
		all = append(all, plot.Tick{Value: v, Label: strconv.FormatFloat(v/scale, 'g', 6, 64) + unit})
	}
	return all
}

// pair draws two plots side by side, whose rows are the same.
func (p *picture) pair(left, right *plot.Plot, top vg.Length, share float64) {
	right.Y.Tick.Marker = plot.ConstantTicks(nil)
	width := vg.Length(pictureWidth - 2*margin)
	height := p.height - top - margin/2
	first := width * vg.Length(share)
	left.Draw(p.area(margin, top, first-8, height))
	right.Draw(p.area(margin+first+8, top, width-first-8, height))
}

func inkOf(label string) tint {
	if strings.HasPrefix(label, ours) {
		return inkOurs
	}
	return inkOthers
}

func maxOf(t *Table, column string) (most float64) {
	for _, row := range t.Rows {
		if s := t.cell(row.Label, column); s != nil {
			most = max(most, s.Median, s.High)
		}
	}
	return most
}

func drawBurst(r *Report) *picture {
	t := r.table("burst", "burst")
	if t == nil {
		return nil
	}
	var in, late []bar
	var clients float64
	for i, row := range t.Rows {
		at, again, lost, p99 := row.Cells[0], row.Cells[1], row.Cells[2], row.Cells[5]
		if i == 0 {
			clients = math.Round(at.Median + again.Median + lost.Median)
		}
		in = append(in, bar{row.Label, []part{{at.Median, inkOf(row.Label)}}, format(math.Round(at.Median), "")})
		text := format(p99.Median, "ns")
		if p99.Median >= float64(burstTimeout) {
			text = "over " + text
		}
		late = append(late, bar{row.Label, []part{{p99.Median, inkOf(row.Label)}}, text})
	}
	p := newPicture(headline+22+vg.Length(len(in))*barRow+axisHeight+margin/2,
		"Burst: who is let in at once", t.Title)
	p.pair(
		barPlot("Clients let in at once", "clients", in, clients*1.14, ticks(clients, 5, "", 1)),
		barPlot("Time to the first byte, p99", "seconds", late, maxOf(t, "first byte, p99")*1.34, ticks(maxOf(t, "first byte, p99"), 4, "", 1e9)),
		headline+22, 0.66)
	return p
}

func drawRestart(r *Report) *picture {
	var plots []*plot.Plot
	var n int
	for _, load := range []struct{ table, title string }{
		{"busy", "Clients that never rest"},
		{"calm", "Clients that rest for about 20 ms"},
	} {
		t := r.table("restart", load.table)
		if t == nil {
			return nil
		}
		var rows []bar
		most := 1.0
		for _, row := range t.Rows {
			lost, stalled := t.cell(row.Label, "lost"), t.cell(row.Label, "stalled")
			rows = append(rows, bar{row.Label, []part{{lost.Median, inkLost}, {stalled.Median, inkLate}},
				tenths(lost.Median) + " + " + tenths(stalled.Median)})
			most = max(most, lost.Median+stalled.Median)
		}
		n = len(rows)
		plots = append(plots, barPlot(load.title, "clients in one restart", rows, most*1.4, ticks(most, 4, "", 1)))
	}
	p := newPicture(headline+22+vg.Length(n)*barRow+axisHeight+margin/2,
		"Restart: clients lost and stalled",
		fmt.Sprintf("Of %d clients of an HTTP server. Red: lost, which is refused or reset; yellow: + stalled for a second. Medians.", restartClients))
	p.pair(plots[0], plots[1], headline+22, 0.67)
	return p
}

// tenths writes a number that is the mean of a few counts.
func tenths(v float64) string { return strconv.FormatFloat(math.Round(10*v)/10, 'f', -1, 64) }

func drawQueue(r *Report) *picture {
	t := r.table("queue", "queue")
	if t == nil {
		return nil
	}
	p := newPicture(360, "Reading one accept queue", "The time of one reading, beside other sockets; both axes are logarithmic. Medians.")
	pl := newPlot()
	var curves curves
	for _, row := range t.Rows {
		if strings.Contains(row.Label, "control") {
			continue
		}
		c := curve{label: row.Label, ink: inkOf(row.Label)}
		for i := 0; i < len(t.Columns); i += 2 {
			size, _ := strconv.ParseFloat(t.Columns[i].Name, 64)
			c.x, c.y = append(c.x, size), append(c.y, row.Cells[i].Median)
		}
		c.label += ", " + format(c.y[len(c.y)-1], "ns")
		curves = append(curves, c)
	}
	pl.Add(curves)
	pl.X.Scale, pl.Y.Scale = plot.LogScale{}, plot.LogScale{}
	pl.Y.Min = math.Pow(10, math.Floor(math.Log10(pl.Y.Min)))
	pl.Y.Max = math.Pow(10, math.Ceil(math.Log10(pl.Y.Max)))
	var x, y []plot.Tick
	for _, v := range curves[0].x {
		x = append(x, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'f', 0, 64)})
	}
	for v := pl.Y.Min; v <= pl.Y.Max*1.0001; v *= 10 {
		y = append(y, plot.Tick{Value: v, Label: format(math.Round(v), "ns")})
	}
	pl.X.Tick.Marker, pl.Y.Tick.Marker = plot.ConstantTicks(x), plot.ConstantTicks(y)
	pl.X.Label.Text = "other TCP sockets"
	const names = 280
	pl.Draw(p.area(margin, headline, pictureWidth-2*margin-names, p.height-headline-margin/2))
	return p
}

type curve struct {
	label string
	ink   tint
	x, y  []float64
}

// curves draws lines with their names at their ends.
type curves []curve

func (cs curves) DataRange() (xmin, xmax, ymin, ymax float64) {
	xmin, ymin = math.Inf(1), math.Inf(1)
	for _, c := range cs {
		xmin, xmax = min(xmin, slices.Min(c.x)), max(xmax, slices.Max(c.x))
		ymin, ymax = min(ymin, slices.Min(c.y)), max(ymax, slices.Max(c.y))
	}
	return xmin, xmax, ymin, ymax
}

func (cs curves) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for _, t := range p.Y.Tick.Marker.Ticks(p.Y.Min, p.Y.Max) {
		c.StrokeLine2(draw.LineStyle{Color: inkGrid.light, Width: 0.8}, c.Min.X, y(t.Value), c.Max.X, y(t.Value))
	}
	order := slices.Clone(cs)
	slices.SortFunc(order, func(a, b curve) int { return int(math.Copysign(1, a.y[len(a.y)-1]-b.y[len(b.y)-1])) })
	const line = 14
	below := vg.Length(math.Inf(-1))
	for _, cv := range order {
		points := make([]vg.Point, len(cv.x))
		for i := range points {
			points[i] = vg.Point{X: x(cv.x[i]), Y: y(cv.y[i])}
		}
		c.StrokeLines(draw.LineStyle{Color: cv.ink.light, Width: 1.8}, points)
		for _, pt := range points {
			c.DrawGlyph(draw.GlyphStyle{Color: cv.ink.light, Radius: 3, Shape: draw.CircleGlyph{}}, pt)
		}
		end := points[len(points)-1]
		below = max(below+line, end.Y)
		c.StrokeLine2(draw.LineStyle{Color: cv.ink.light, Width: 0.8}, end.X+5, end.Y, end.X+14, below)
		c.FillText(face(12, inkText, false, draw.XLeft, draw.YCenter), vg.Point{X: end.X + 18, Y: below}, cv.label)
	}
}

// drawSpeed shows what should be equal: 1 is net.Listen.
func drawSpeed(r *Report) *picture {
	type panel struct{ result, table, title, column string }
	panels := []panel{
		{"listen", "literal", "Listen+Close, host", "CPU × net.Listen"},
		{"listen", "wildcard", "Listen+Close, :port", "CPU × net.Listen"},
		{"accept", "accept", "Accept", "CPU × net.Listen"},
		{"accept", "http", "net/http, 1 request", "CPU × net.Listen"},
	}
	const rows = 7
	p := newPicture(headline+22+rows*barRow+axisHeight+margin/2, "CPU time, where net.Listen is 1",
		"The line is 1. Dots are medians, lines the quartiles; the second row is the first again and shows the noise.")
	const names = 176
	width := vg.Length(pictureWidth-2*margin-names) / vg.Length(len(panels))
	for i, pan := range panels {
		t := r.table(pan.result, pan.table)
		if t == nil {
			return nil
		}
		pl := newPlot()
		d := dots{title: pan.title, most: 1.5}
		for _, row := range t.Rows {
			if row.Label == handMade { // it is no way to listen, and not in every table
				continue
			}
			s := t.cell(row.Label, pan.column)
			d.rows = append(d.rows, dot{row.Label, *s})
			d.most = max(d.most, s.High*1.05)
		}
		pl.Add(d)
		pl.X.Tick.Marker = plot.ConstantTicks(ticks(d.most, 4, "", 1))
		pl.X.Label.Text = "×"
		var labels []string
		for _, row := range d.rows {
			labels = append(labels, row.label)
		}
		nameRows(pl, d.at, labels)
		left := margin + names + vg.Length(i)*width
		const top = headline + 22
		if i > 0 {
			pl.Y.Tick.Marker = plot.ConstantTicks(nil)
			pl.Draw(p.area(left, top, width-10, p.height-top-margin/2))
		} else {
			pl.Draw(p.area(margin, top, names+width-10, p.height-top-margin/2))
		}
	}
	return p
}

type dot struct {
	label string
	Summary
}

type dots struct {
	title string
	rows  []dot
	most  float64
}

func (d dots) at(i int) float64 { return float64(len(d.rows) - 1 - i) }

func (d dots) DataRange() (xmin, xmax, ymin, ymax float64) {
	return 0, d.most, -0.5, float64(len(d.rows)) - 0.5
}

func (d dots) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	headPanel(c, d.title)
	gridX(c, p)
	c.StrokeLine2(draw.LineStyle{Color: inkMute.light, Width: 1}, x(1), c.Min.Y, x(1), c.Max.Y)
	for i, row := range d.rows {
		ink := inkOf(row.label).light
		c.StrokeLine2(draw.LineStyle{Color: ink, Width: 2}, x(row.Low), y(d.at(i)), x(row.High), y(d.at(i)))
		c.DrawGlyph(draw.GlyphStyle{Color: ink, Radius: 3.5, Shape: draw.CircleGlyph{}}, vg.Point{X: x(row.Median), Y: y(d.at(i))})
	}
}
