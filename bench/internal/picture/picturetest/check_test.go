package picturetest

import (
	"os"
	"strings"
	"testing"
)

// TestProblems changes good pictures so that they cannot be read. Each change is found.
func TestProblems(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	bars, lines, drawing := read("testdata/bars.svg"), read("../../../../docs/overload.svg"), read("../../../../docs/queues.svg")
	for _, q := range []struct{ name, svg, old, new, want string }{
		{"nothing", bars, "", "", ""},
		{"nothing", lines, "", "", ""},
		{"a bar that is too long", bars, "L465.69,185.14L465.69,197.14", "L665.69,185.14L665.69,197.14", "leaves its panel"},
		{"a bar that is longer than the picture", bars, "L465.69,185.14", "L865.69,185.14", "not in the picture"},
		{"a bar without an end", bars, "L465.69,185.14", "L+Inf,185.14", "not in the picture"},
		{"no number in a shape", bars, "L465.69,185.14", "LNaN,185.14", "not in the picture"},
		{"no number in a text", bars, ">129<", ">NaN<", "is no number"},
		{"a line of rounds that is too long", bars, "L768.31,299.19", "L828.31,299.19", "leaves its panel"},
		{"a number in its bar", bars, "L465.69,98.704L465.69,110.7", "L485.69,98.704L485.69,110.7", "overlap"},
		{"a text that is too long", bars, ">4.10 s<", ">4.10 s and more<", "leaves the picture"},
		{"two texts at one place", lines, `<text x="237.52"`, `<text x="330.52"`, "overlap"},
		{"a name of the axis that is cut", lines, `<text x="283.66"`, `<text x="483.66"`, "leaves the picture"},
		{"no XML", bars, "<svg", "<svg <", "XML"},
		{"a drawing: nothing", drawing, "", "", ""},
		{"a drawing: a text that is too long", drawing, ">client<", ">client of a server<", "leaves a box"},
		{"a drawing: two texts at one place", drawing, `x="66.5" y="64"`, `x="66.5" y="52"`, "overlap"},
	} {
		svg := strings.Replace(q.svg, q.old, q.new, 1)
		if svg == q.svg && q.old != "" {
			t.Fatalf("%s: the picture has no %q", q.name, q.old)
		}
		var found []string
		if q.svg == drawing {
			found = drawingProblems(t, []byte(svg))
		} else {
			found = problems([]byte(svg))
		}
		if text := strings.Join(found, "\n"); text != "" != (q.want != "") || !strings.Contains(text, q.want) {
			t.Errorf("%s: %q, want %q", q.name, text, q.want)
		}
	}
}
