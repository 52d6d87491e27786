// Package picturetest checks pictures in tests.
package picturetest

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/acceptq/acceptq/bench/internal/picture"
)

// A box is the room that a text or a shape takes. The vertical axis points down.
type box struct {
	what                     string
	left, right, top, bottom float64
}

// touches reports whether less than gap pixels are between two boxes, in both directions.
func (a box) touches(b box, gap float64) bool {
	return a.left < b.right+gap && b.left < a.right+gap && a.top < b.bottom && b.top < a.bottom
}

func (a box) in(b box) bool {
	return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom
}

// textBox returns the room of a line of text that begins at x and stands on y.
func textBox(words string, x, y, size float64, bold bool) box {
	width := picture.TextWidth(strings.TrimRight(words, " "), size, bold)
	return box{words, x, x + width, y - 0.8*size, y + 0.2*size}
}

// A sheet has what Legible looks at.
type sheet struct {
	texts  []box
	bars   []box // bars and points
	ranges []box // the lines from the smallest round to the largest
	axes   []box // the vertical lines at which bars begin
}

var (
	fontSize = regexp.MustCompile(`font-size:([0-9.]+)px`)
	number   = `([0-9.e+-]+|NaN|[+-]?Inf)`
	corner   = regexp.MustCompile(`[ML]` + number + `,` + number)
)

// parse reads a picture of package picture.
func parse(svg []byte) (s sheet, height float64, err error) {
	d := xml.NewDecoder(bytes.NewReader(svg))
	var upright []bool // of the groups around an element
	for {
		token, err := d.Token()
		if err == io.EOF {
			return s, height, nil
		} else if err != nil {
			return s, 0, err
		}
		switch e := token.(type) {
		case xml.EndElement:
			if e.Name.Local == "g" {
				upright = upright[:len(upright)-1]
			}
		case xml.StartElement:
			a := map[string]string{}
			for _, attr := range e.Attr {
				a[attr.Name.Local] = attr.Value
			}
			switch e.Name.Local {
			case "svg":
				height, err = strconv.ParseFloat(a["height"], 64)
			case "g":
				upright = append(upright, !strings.HasPrefix(a["transform"], "rotate(90)"))
			case "text":
				var words string
				if err = d.DecodeElement(&words, &e); err == nil && strings.TrimSpace(words) != "" {
					err = s.addText(words, a, height, !slices.Contains(upright, false))
				}
			case "path":
				err = s.addPath(a["d"], a["style"], height)
			}
			if err != nil {
				return s, 0, fmt.Errorf("%s %v: %w", e.Name.Local, a, err)
			}
		}
	}
}

func (s *sheet) addText(words string, a map[string]string, height float64, upright bool) error {
	x, err := strconv.ParseFloat(a["x"], 64)
	if err != nil {
		return err
	}
	y, err := strconv.ParseFloat(a["y"], 64)
	if err != nil {
		return err
	}
	m := fontSize.FindStringSubmatch(a["style"])
	if m == nil {
		return fmt.Errorf("no size")
	}
	size, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return err
	}
	b := textBox(words, x, height+y, size, strings.Contains(a["style"], "bold"))
	if !upright { // it begins at the bottom and reads upwards
		b = box{words, y - 0.8*size, y + 0.2*size, height - x - (b.right - b.left), height - x}
	}
	s.texts = append(s.texts, b)
	return nil
}

func (s *sheet) addPath(d, style string, height float64) error {
	b := box{d, math.Inf(1), math.Inf(-1), math.Inf(1), math.Inf(-1)}
	for _, m := range corner.FindAllStringSubmatch(d, -1) {
		x, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return err
		}
		y, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return err
		}
		if y = height - y; !(x >= 0 && x <= picture.Width && y >= 0 && y <= height) { // NaN too
			return fmt.Errorf("%v, %v is not in the picture", x, y)
		}
		b.left, b.right, b.top, b.bottom = min(b.left, x), max(b.right, x), min(b.top, y), max(b.bottom, y)
	}
	switch {
	case strings.HasPrefix(style, "fill:#") && b.bottom-b.top < 20: // no frame
		if strings.Contains(d, "A") { // a circle, of which only the right end is a corner
			b.left = b.right - 8
		}
		s.bars = append(s.bars, b)
	case strings.Contains(style, "stroke-width:1.5"):
		s.ranges = append(s.ranges, b)
	case style == "fill:none;stroke:#818B98" && b.left == b.right:
		s.axes = append(s.axes, b)
	}
	return nil
}

// Legible fails if a picture of package picture is not XML, if a number in it is not
// finite, if a text touches another text, a bar or the edge, or if a bar or a line
// leaves its panel.
func Legible(t *testing.T, name string, svg []byte) {
	t.Helper()
	for _, problem := range problems(svg) {
		t.Errorf("%s: %s", name, problem)
	}
}

func problems(svg []byte) (found []string) {
	add := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	s, height, err := parse(svg)
	if err != nil {
		return []string{err.Error()}
	}
	if len(s.texts) < 10 {
		add("only %d texts", len(s.texts))
	}
	page := box{"", 10, picture.Width - 10, 5, height - 5}
	for i, a := range s.texts {
		if strings.Contains(a.what, "NaN") || strings.Contains(a.what, "Inf") {
			add("%q is no number", a.what)
		}
		if !a.in(page) {
			add("%q leaves the picture: %+v", a.what, a)
		}
		for _, b := range s.texts[:i] {
			if a.touches(b, 3) {
				add("%q and %q overlap", a.what, b.what)
			}
		}
		for _, b := range slices.Concat(s.bars, s.ranges) {
			if a.touches(b, 1) {
				add("%q and the shape %s overlap", a.what, b.what)
			}
		}
	}
	if len(s.axes) == 0 { // a picture with lines
		return found
	}
	for _, b := range slices.Concat(s.bars, s.ranges) {
		panel := page
		for _, axis := range s.axes { // of all panels, from left to right
			if axis.left <= b.right {
				panel = box{"", axis.left - 5, page.right, axis.top, axis.bottom}
			} else {
				panel.right = min(panel.right, axis.left)
			}
		}
		if !b.in(panel) {
			add("the shape %s leaves its panel", b.what)
		}
	}
	return found
}

var words = regexp.MustCompile(`>[^<\n]+</text>`)

// Committed fails if NAME.svg has other words than the picture, if NAME-dark.svg is not
// its dark form, or if the picture is not legible. It does not compare coordinates, whose
// last digit depends on the machine.
func Committed(t *testing.T, name string, svg []byte) {
	t.Helper()
	Legible(t, name, svg)
	light, err := os.ReadFile(name + ".svg")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := words.FindAll(light, -1), words.FindAll(svg, -1); !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("%s.svg is not the picture of its results; draw it again:\n%s\n%s", name, got, want)
	}
	darkened(t, name, light)
}

// darkened fails if NAME-dark.svg is not the dark form of NAME.svg.
func darkened(t *testing.T, name string, light []byte) {
	t.Helper()
	dark, err := os.ReadFile(name + "-dark.svg")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dark, picture.Dark(light)) {
		t.Errorf("%s-dark.svg is not the dark form of %[1]s.svg: run go run -C bench . -draw", name)
	}
}
