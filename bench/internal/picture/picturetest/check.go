// Package picturetest checks pictures in tests.
package picturetest

import (
	"bytes"
	"encoding/xml"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/acceptq/acceptq/bench/internal/picture"
)

// A text is a line of text in a picture, and the room that it takes.
type text struct {
	X     float64 `xml:"x,attr"`
	Y     float64 `xml:"y,attr"`
	Style string  `xml:"style,attr"`
	Words string  `xml:",chardata"`
	width float64
}

var size = regexp.MustCompile(`font-size:([0-9.]+)px`)

// Legible fails if a picture of package picture is not XML, or if a text touches another
// text or the edge.
func Legible(t *testing.T, name string, svg []byte) {
	t.Helper()
	var file struct {
		Height float64 `xml:"height,attr"`
		Group  struct {
			Texts  []text `xml:"text"`
			Groups []struct {
				Inner []byte `xml:",innerxml"`
			} `xml:"g"`
		} `xml:"g"`
	}
	if err := xml.Unmarshal(svg, &file); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	texts := file.Group.Texts // without the rotated ones, which are in groups of their own
	if len(texts) < 10 {
		t.Fatalf("%s: only %d texts", name, len(texts))
	}
	for i := range texts {
		a := &texts[i]
		m := size.FindStringSubmatch(a.Style)
		if m == nil {
			t.Fatalf("%s: %q has no size", name, a.Words)
		}
		high, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		a.width = picture.TextWidth(strings.TrimRight(a.Words, " "), high, strings.Contains(a.Style, "bold"))
		if a.width == 0 {
			continue
		}
		if top := -a.Y + high; a.X < 10 || a.X+a.width > picture.Width-10 || -a.Y < 5 || top > file.Height-5 {
			t.Errorf("%s: %q leaves the picture", name, a.Words)
		}
		for _, b := range texts[:i] {
			if d := a.Y - b.Y; b.width > 0 && d < 12 && d > -12 && a.X < b.X+b.width+3 && b.X < a.X+a.width+3 {
				t.Errorf("%s: %q and %q overlap", name, a.Words, b.Words)
			}
		}
	}
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
	dark, err := os.ReadFile(name + "-dark.svg")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := words.FindAll(light, -1), words.FindAll(svg, -1); !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("%s.svg is not the picture of its results; draw it again:\n%s\n%s", name, got, want)
	}
	if !bytes.Equal(dark, picture.Dark(light)) {
		t.Errorf("%s-dark.svg is not the dark form of %[1]s.svg: draw it again", name)
	}
}
