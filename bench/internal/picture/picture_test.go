package picture_test

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/acceptq/acceptq/bench/internal/picture"
	"github.com/acceptq/acceptq/bench/internal/picture/picturetest"
)

func number(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }

// bars makes a picture with one panel, and a row for each list of rounds.
func bars(log bool, rounds ...[]float64) picture.Bars {
	p := picture.Panel{Title: "a panel", Log: log, Format: number}
	c := picture.Bars{Title: "A picture", Notes: []string{strings.Repeat("many words about it ", 20)}}
	for _, r := range rounds {
		p.Bars = append(p.Bars, picture.Bar{Rounds: r, Ink: picture.Ours})
		c.Rows = append(c.Rows, "a row with a name of some length")
	}
	c.Panels = []picture.Panel{p}
	return c
}

func TestBars(t *testing.T) {
	many := [][]float64{{1, 2, 3}, {300}, {0, 0, 500}, {0}, nil, {90, 120}, {4, 4, 4}}
	c := bars(false, many...)
	c.Panels = append(c.Panels, c.Panels[0], c.Panels[0])
	for _, shared := range []bool{false, true} {
		c.Shared = shared
		svg, err := c.Draw()
		if err != nil {
			t.Fatal(err)
		}
		picturetest.Legible(t, "bars", svg)
		if n := bytes.Count(svg, []byte(">not measured<")); n != 3 {
			t.Errorf("%d panels say that a row was not measured, want 3", n)
		}
	}
	for _, c := range []picture.Bars{
		bars(true, []float64{900}, []float64{1e6, 2e6}, []float64{1e9}, nil),
		bars(true, []float64{1000}, []float64{1000}, nil, nil, nil),
		bars(true, nil, nil, nil, nil, nil),
		bars(false, nil, nil, nil, []float64{0}, nil),
	} {
		svg, err := c.Draw()
		if err != nil {
			t.Fatal(err)
		}
		picturetest.Legible(t, "bars", svg)
	}
}

// Panels that share their scale show the same number at the same place.
func TestShared(t *testing.T) {
	c := bars(true, []float64{1e3}, []float64{1e4})
	c.Panels = append(c.Panels, bars(true, []float64{1e5}, []float64{1e6}).Panels[0])
	c.Shared = true
	svg, err := c.Draw()
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(svg, []byte(">1e+05<")); n != 3 { // the row and both axes
		t.Errorf("%d times 1e+05, want 3\n%s", n, svg)
	}
}

// What cannot be drawn truthfully is an error.
func TestWrongBars(t *testing.T) {
	for name, c := range map[string]picture.Bars{
		"an infinite round":                bars(false, []float64{1}, []float64{math.Inf(1)}),
		"an infinite round, logarithmic":   bars(true, []float64{1}, []float64{math.Inf(1)}),
		"no number":                        bars(false, []float64{math.NaN()}),
		"a negative round":                 bars(false, []float64{-1, 1}),
		"zero, logarithmic":                bars(true, []float64{0, 1}),
		"fewer bars than rows":             {Title: "x", Rows: []string{"a", "b"}, Panels: bars(false, []float64{1}).Panels},
		"an infinite round of another row": bars(false, []float64{math.Inf(1), 1, 2}),
	} {
		if _, err := c.Draw(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// One round does not set the scale.
func TestScale(t *testing.T) {
	svg, err := bars(false, []float64{4, 4, 55}, []float64{1, 2, 3}, []float64{7, 7, 8}, nil).Draw()
	if err != nil {
		t.Fatal(err)
	}
	picturetest.Legible(t, "bars", svg)
	for words, want := range map[string]int{">4 (to 55)<": 1, ">2<": 1, ">7<": 1, ">50<": 0} {
		if n := bytes.Count(svg, []byte(words)); n != want {
			t.Errorf("%d times %s, want %d:\n%s", n, words, want, svg)
		}
	}
}

// Each bar has a length, except for 0.
func TestLength(t *testing.T) {
	bar := regexp.MustCompile(`<path d="M([0-9.]+),[0-9.]+L([0-9.]+),[^"]*Z" style="fill:` + "#0969DA")
	svg, err := bars(false, []float64{1000}, []float64{0.1}, []float64{0}).Draw()
	if err != nil {
		t.Fatal(err)
	}
	found := bar.FindAllSubmatch(svg, -1)
	if len(found) != 2 {
		t.Fatalf("%d bars, want 2:\n%s", len(found), svg)
	}
	for _, m := range found {
		from, _ := strconv.ParseFloat(string(m[1]), 64)
		to, _ := strconv.ParseFloat(string(m[2]), 64)
		if to-from < 0.9 {
			t.Errorf("a bar goes from %v to %v", from, to)
		}
	}
}

func TestLines(t *testing.T) {
	l := picture.Lines{Title: "Lines", X: "load", Y: "answers", At: []float64{1, 2}, FormatAt: number, Top: 10}
	for _, name := range []string{"one", "two", "three"} {
		l.AllSeries = append(l.AllSeries, picture.Series{Name: name, Ink: picture.Green, Points: []picture.Point{{X: 1, Rounds: []float64{2, 5}}, {X: 2}}})
	}
	svg, err := l.Draw()
	if err != nil {
		t.Fatal(err)
	}
	picturetest.Legible(t, "lines", svg)
	for _, v := range []float64{-1, math.NaN(), math.Inf(1)} {
		l.AllSeries[1].Points[1].Rounds = []float64{v}
		if _, err := l.Draw(); err == nil {
			t.Errorf("%v: no error", v)
		}
	}
}

// Every color of a light picture has a dark one. Otherwise it would be light on a dark page.
func TestDark(t *testing.T) {
	color := regexp.MustCompile(`#[0-9A-Fa-f]{6}\b`)
	var files []string
	for _, pattern := range []string{"../../results/*.svg", "../../../docs/*.svg"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, names...)
	}
	light := 0
	for _, name := range files {
		if strings.HasSuffix(name, "-dark.svg") {
			continue
		}
		light++
		svg, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		before, after := color.FindAll(svg, -1), color.FindAll(picture.Dark(svg), -1)
		for i := range before {
			if bytes.EqualFold(before[i], after[i]) {
				t.Errorf("%s: %s has no dark color", name, before[i])
			}
		}
	}
	if light < 6 {
		t.Errorf("only %d pictures", light)
	}
}

func TestLink(t *testing.T) {
	want := `<picture><source media="(prefers-color-scheme: dark)" srcset="a/b-dark.svg"><img alt="&quot;x&quot;" src="a/b.svg"></picture>`
	if got := picture.Link("a/b", `"x"`); got != want {
		t.Error(got)
	}
}
