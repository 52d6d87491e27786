package picturetest

import (
	"encoding/xml"
	"os"
	"slices"
	"strings"
	"testing"
)

// Drawing fails if NAME-dark.svg is not the dark form of NAME.svg, which is drawn by hand,
// or if a text of NAME.svg touches another text or leaves the box in which it stands.
func Drawing(t *testing.T, name string) {
	t.Helper()
	svg, err := os.ReadFile(name + ".svg")
	if err != nil {
		t.Fatal(err)
	}
	darkened(t, name, svg)
	for _, problem := range drawingProblems(t, svg) {
		t.Errorf("%s: %s", name, problem)
	}
}

func drawingProblems(t *testing.T, svg []byte) (found []string) {
	t.Helper()
	var file struct {
		Rects []struct {
			Class  string  `xml:"class,attr"`
			X      float64 `xml:"x,attr"`
			Y      float64 `xml:"y,attr"`
			Width  float64 `xml:"width,attr"`
			Height float64 `xml:"height,attr"`
		} `xml:"rect"`
		Texts []struct {
			Class string  `xml:"class,attr"`
			X     float64 `xml:"x,attr"`
			Y     float64 `xml:"y,attr"`
			Words string  `xml:",chardata"`
		} `xml:"text"`
	}
	if err := xml.Unmarshal(svg, &file); err != nil {
		t.Fatal(err)
	}
	var boxes, texts []box
	for _, r := range file.Rects {
		boxes = append(boxes, box{r.Class, r.X, r.X + r.Width, r.Y, r.Y + r.Height})
	}
	for _, e := range file.Texts {
		classes := strings.Fields(e.Class)
		is := func(class string) bool { return slices.Contains(classes, class) }
		size := 13.0
		switch {
		case is("name"):
			size = 14
		case is("mute"):
			size = 12
		case is("code"):
			size = 14 // a fixed pitch of 12 pixels, which is wider
		}
		b := textBox(e.Words, e.X, e.Y, size, is("name"))
		if !is("left") {
			half := (b.right - b.left) / 2
			b.left, b.right = b.left-half, b.right-half
		}
		texts = append(texts, b)
	}
	if len(boxes) == 0 || len(texts) == 0 {
		return []string{"no box or no text"}
	}
	for i, a := range texts {
		for _, b := range texts[:i] {
			if a.touches(b, 3) {
				found = append(found, a.what+" and "+b.what+" overlap")
			}
		}
		for _, b := range boxes {
			inner := box{b.what, b.left + 4, b.right - 4, b.top + 2, b.bottom - 2}
			if a.touches(b, 0) && !a.in(inner) {
				found = append(found, a.what+" leaves a box of the class "+b.what)
			}
		}
	}
	return found
}
