// Package picture draws the pictures of the pages, all in one style. Each picture has a
// light and a dark file. A picture that cannot be drawn truthfully is an error.
package picture

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// All lengths are pixels. A page on GitHub is Width wide, so a picture is shown there as
// it is.
const (
	Width  = 830
	margin = 20
	lead   = 16 // from one line of text to the next
)

// An Ink is a color on a light page, and the one that replaces it on a dark page.
type Ink struct{ light, dark string }

// These are the colors of GitHub. No two light ones are equal, see Dark.
var (
	body   = Ink{"#1F2328", "#F0F6FC"}
	muted  = Ink{"#59636E", "#9DA5AE"}
	back   = Ink{"#F6F8FA", "#151B23"}
	border = Ink{"#D1D9E0", "#3D444D"}
	white  = Ink{"#FFFFFF", "#0D1117"}

	Ours   = Ink{"#0969DA", "#4493F8"}
	Others = Ink{"#818B98", "#7D8590"}
	Red    = Ink{"#CF222E", "#F85149"}
	Yellow = Ink{"#BF8700", "#D29922"}
	Brown  = Ink{"#9A6700", "#E3B341"}
	Green  = Ink{"#1A7F37", "#3FB950"}

	palette = []Ink{body, muted, back, border, white, Ours, Others, Red, Yellow, Brown, Green}
)

// RGBA makes an Ink a color.Color.
func (i Ink) RGBA() (r, g, b, a uint32) {
	v, err := strconv.ParseUint(i.light[1:], 16, 24)
	if err != nil {
		panic(err)
	}
	return uint32(v>>16) * 0x101, uint32(v>>8&0xff) * 0x101, uint32(v&0xff) * 0x101, 0xffff
}

// Dark returns the dark form of a light picture.
func Dark(svg []byte) []byte {
	var pairs []string
	for _, i := range palette {
		pairs = append(pairs, i.light, i.dark, strings.ToLower(i.light), i.dark)
	}
	return []byte(strings.NewReplacer(pairs...).Replace(string(svg)))
}

// Write writes the light form of a picture to NAME.svg and the dark form to NAME-dark.svg.
func Write(name string, svg []byte) error {
	if err := os.WriteFile(name+".svg", svg, 0o666); err != nil {
		return err
	}
	return os.WriteFile(name+"-dark.svg", Dark(svg), 0o666)
}

// Link returns the lines of a page that show the picture NAME. The reader's browser
// chooses the file.
func Link(name, alt string) string {
	return fmt.Sprintf(`<picture><source media="(prefers-color-scheme: dark)" srcset="%[1]s-dark.svg"><img alt="%[2]s" src="%[1]s.svg"></picture>`,
		path.Clean(name), strings.ReplaceAll(alt, `"`, "&quot;"))
}

func style(size vg.Length, ink Ink, bold bool) text.Style {
	f := font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
	if bold {
		f.Weight = xfont.WeightBold
	}
	return text.Style{Color: ink, Font: f, Handler: text.Plain{Fonts: font.DefaultCache}}
}

// A sheet is a picture with its frame, title and notes. The rest is drawn between top
// and bottom.
type sheet struct {
	file                *vgsvg.Canvas
	page                draw.Canvas
	height, top, bottom vg.Length
}

func newSheet(title string, notes []string, middle vg.Length) sheet {
	plain, bold := style(12, body, false), style(15, body, true)
	var lines []string
	for _, note := range notes {
		lines = append(lines, wrap(plain, note)...)
	}
	const head = 46
	height := head + middle + vg.Length(len(lines))*lead + margin
	svg := vgsvg.New(Width, height)
	s := sheet{svg, draw.New(svg), height, height - head, height - head - middle}
	frame := vg.Rectangle{Min: vg.Point{X: 0.5, Y: 0.5}, Max: vg.Point{X: Width - 0.5, Y: height - 0.5}}
	s.page.SetColor(back)
	s.page.Fill(frame.Path())
	s.page.SetColor(border)
	s.page.SetLineWidth(1)
	s.page.Stroke(frame.Path())
	s.page.FillText(bold, vg.Point{X: margin, Y: height - 32}, title)
	for i, line := range lines {
		s.page.FillText(plain, vg.Point{X: margin, Y: s.bottom - vg.Length(i+1)*lead}, line)
	}
	return s
}

var unreal = regexp.MustCompile(`[ML,"](NaN|[+-]?Inf)\b`)

// bytes returns the file. vgsvg counts in points and names one font only. A coordinate
// that is no finite number is an error.
func (s sheet) bytes() ([]byte, error) {
	var b bytes.Buffer
	if _, err := s.file.WriteTo(&b); err != nil {
		return nil, err
	}
	if m := unreal.Find(b.Bytes()); m != nil {
		return nil, fmt.Errorf("a coordinate is %s", m[1:])
	}
	size := fmt.Sprintf(`width="%d" height="%.5g"`, Width, float64(s.height))
	return []byte(strings.NewReplacer(
		fmt.Sprintf(`width="%dpt" height="%.5gpt"`, Width, float64(s.height)), size,
		"font-family:Liberation Sans;", "font-family:Helvetica,Arial,'Liberation Sans',sans-serif;",
	).Replace(b.String())), nil
}

// wrap breaks a text into lines that fit into a picture.
func wrap(s text.Style, words string) (lines []string) {
	line := ""
	for word := range strings.FieldsSeq(words) {
		if line != "" && s.Width(line+" "+word) > Width-2*margin {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimSpace(line + " " + word)
	}
	return append(lines, line)
}

// TextWidth returns the width of a text of a picture.
func TextWidth(words string, size float64, bold bool) float64 {
	return float64(style(vg.Length(size), body, bold).Width(words))
}
