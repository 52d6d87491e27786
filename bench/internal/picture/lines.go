package picture

import (
	"fmt"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// A Series is a line of a picture. It goes through the median of the rounds of each
// point, and a bar at each point goes from the smallest round to the largest.
type Series struct {
	Name   string
	Ink    Ink
	Points []Point
}

// A Point has the rounds of one place on the horizontal axis.
type Point struct {
	X      float64
	Rounds []float64
}

// Lines is a picture with one line for each series, and their names below.
type Lines struct {
	Title     string
	Notes     []string
	X, Y      string // the names of the axes
	At        []float64
	FormatAt  func(float64) string
	Top       float64 // of the vertical axis, which begins at 0; higher if a round is higher
	AllSeries []Series
}

// Draw returns the light form of the picture.
func (l Lines) Draw() ([]byte, error) {
	const tall = 330
	q := plot.New()
	q.BackgroundColor = nil
	q.X.Min, q.X.Max, q.X.Padding = 0, 0, 0
	q.Y.Min, q.Y.Max, q.Y.Padding = 0, l.Top, 0
	q.X.Label.Text, q.Y.Label.Text = l.X, l.Y
	var marks plot.ConstantTicks
	for _, x := range l.At {
		marks = append(marks, plot.Tick{Value: x, Label: l.FormatAt(x)})
		q.X.Max = max(q.X.Max, x)
	}
	q.X.Max *= 1.02 // room for the last point
	q.X.Tick.Marker = marks
	for _, axis := range []*plot.Axis{&q.X, &q.Y} {
		axis.LineStyle.Color, axis.Tick.LineStyle.Color = Others, Others
		axis.Tick.Length = 4
		label, tick := style(12, body, false), style(12, body, false)
		label.XAlign, label.YAlign = draw.XCenter, draw.YBottom
		tick.XAlign, tick.YAlign = draw.XCenter, draw.YTop
		if axis == &q.Y {
			tick.XAlign, tick.YAlign = draw.XRight, draw.YCenter
		}
		axis.Label.TextStyle, axis.Tick.Label = label, tick
		axis.Label.Padding = 6
	}
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Horizontal.Dashes, grid.Vertical.Color = border, nil, nil
	q.Add(grid)
	for _, s := range l.AllSeries {
		if err := s.add(q); err != nil {
			return nil, fmt.Errorf("%s: %w", l.Title, err)
		}
	}
	s := newSheet(l.Title, l.Notes, tall+vg.Length(len(l.AllSeries))*rowHeight+6)
	names := vg.Length(len(l.AllSeries)) * rowHeight
	q.Draw(draw.Crop(s.page, margin, -margin, s.bottom+names+14, s.top-s.height))
	for i, series := range l.AllSeries {
		y := s.bottom + names - vg.Length(i)*rowHeight - 4
		s.page.StrokeLine2(draw.LineStyle{Color: series.Ink, Width: 2}, 60, y, 90, y)
		s.page.DrawGlyph(draw.GlyphStyle{Color: series.Ink, Radius: 3, Shape: draw.CircleGlyph{}}, vg.Point{X: 75, Y: y})
		name := style(12, body, false)
		name.YAlign = draw.YCenter
		s.page.FillText(name, vg.Point{X: 100, Y: y}, series.Name)
	}
	return s.bytes()
}

// add adds the line to a plot.
func (s Series) add(q *plot.Plot) error {
	var line, low, high plotter.XYs
	for _, p := range s.Points {
		for _, v := range p.Rounds {
			if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
				return fmt.Errorf("%s: %v at %v cannot be drawn", s.Name, v, p.X)
			}
			q.Y.Max = max(q.Y.Max, v)
		}
		if len(p.Rounds) == 0 {
			continue
		}
		median, least, most := Spread(p.Rounds)
		line = append(line, plotter.XY{X: p.X, Y: median})
		low, high = append(low, plotter.XY{X: p.X, Y: least}), append(high, plotter.XY{X: p.X, Y: most})
	}
	if len(line) == 0 {
		return nil
	}
	path, points, err := plotter.NewLinePoints(line)
	if err != nil {
		return err
	}
	path.Color, path.Width = s.Ink, 2
	points.Color, points.Radius, points.Shape = s.Ink, 3, draw.CircleGlyph{}
	q.Add(path, points)
	for i := range low {
		if low[i].Y == high[i].Y {
			continue
		}
		between, err := plotter.NewLine(plotter.XYs{low[i], high[i]})
		if err != nil {
			return err
		}
		between.Color, between.Width = s.Ink, 2
		q.Add(between)
	}
	return nil
}
