package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
)

// A style is how the output is shown.
type style struct {
	width  int  // of the terminal; 0 is a pipe or a file, whose lines have any length
	color  bool // colors are shown
	screen bool // the screen can be cleared
}

// terminal returns the style of a file.
func terminal(f *os.File) style {
	width := windowWidth(f)
	if width == 0 {
		return style{}
	}
	plain := os.Getenv("TERM") == "dumb"
	return style{width: width, color: os.Getenv("NO_COLOR") == "" && !plain, screen: !plain}
}

// A listing says what the table shows.
type listing struct {
	all, watch, json bool
	every            time.Duration
}

// list shows the table, once or until ctx ends.
func list(ctx context.Context, s style, l listing, out io.Writer) error {
	var before *reading
	for {
		now, err := readTable(ctx, l.all)
		if err != nil {
			if before != nil && ctx.Err() != nil {
				return nil
			}
			return err
		}
		text := ""
		if l.json {
			if text, err = asJSON(now, before, l.watch); err != nil {
				return err
			}
		} else {
			text = table(now, before, l.watch, s)
			switch {
			case l.watch && s.screen:
				text = "\x1b[H\x1b[2J" + text
			case l.watch:
				text = now.at.Format(time.TimeOnly) + "\n" + text + "\n"
			}
		}
		if _, err := io.WriteString(out, text); err != nil {
			return err
		}
		before = &now
		if !l.watch || !pause(ctx, l.every) {
			return nil
		}
	}
}

// rates has the drops per second of listeners since an earlier reading.
type rates struct {
	before  map[uint64]*listener // by inode
	seconds float64
}

func ratesSince(before *reading, now reading) rates {
	r := rates{before: make(map[uint64]*listener)}
	if before != nil {
		r.seconds = now.at.Sub(before.at).Seconds()
		for l := range before.all {
			r.before[l.Inode] = l
		}
	}
	return r
}

// risen returns by how much the drops of a listener have risen since an earlier reading of
// it. The counter of the kernel wraps at 32 bits.
func risen(l, before *listener) int64 {
	if before == nil || before.Addr != l.Addr || before.Stats.Drops == unknown || l.Stats.Drops == unknown {
		return unknown
	}
	return int64(uint32(l.Stats.Drops - before.Stats.Drops))
}

// of returns the rate of a listener. It is unknown for a listener that was not there.
func (r rates) of(l *listener) float64 {
	n := risen(l, r.before[l.Inode])
	if n == unknown || r.seconds <= 0 {
		return unknown
	}
	return float64(n) / r.seconds
}

// A row is one line of the table.
type row struct {
	namespace, address, process, bar, queued, limit, drops, rate string
	used                                                         float64
}

// table returns the table as text. With rates it has the drops per second since before.
func table(now reading, before *reading, rates bool, s style) string {
	since := ratesSince(before, now)
	var rows []row
	unnamed := false
	for _, at := range now.groups() {
		for i, l := range at.group {
			r := row{
				namespace: at.namespace, address: l.address(), process: l.process(), bar: bar(l.Stats),
				queued: number(int64(l.Stats.Queued)) + "/" + number(int64(l.Stats.Capacity)),
				limit:  number(int64(l.Stats.Limit)), drops: number(l.Stats.Drops), used: used(l.Stats),
			}
			if len(at.group) > 1 {
				r.address += fmt.Sprintf(" (%d of %d)", i+1, len(at.group))
			}
			if rates {
				r.rate = "-"
				if n := since.of(l); n != unknown {
					r.rate = strconv.FormatFloat(n, 'f', 1, 64)
				}
			}
			unnamed = unnamed || len(l.Processes) == 0
			rows = append(rows, r)
		}
	}
	var text strings.Builder
	if len(rows) == 0 {
		text.WriteString("Nothing listens here.\n")
	} else if !wide(&text, rows, len(now.namespaces) > 1, rates, s) {
		narrow(&text, rows, rates, s)
	}
	for _, note := range notes(now, unnamed) {
		text.WriteString("\n")
		text.WriteString(fold(note, s.width))
		text.WriteString("\n")
	}
	return text.String()
}

// notes returns the sentences below the table.
func notes(r reading, unnamed bool) (all []string) {
	switch {
	case !unnamed:
	case r.complete:
		all = append(all, "? No process that /proc shows holds this socket.")
	default:
		all = append(all, "? Some processes cannot be read "+unreadable()+".")
	}
	return append(all, r.notes...)
}

// wide writes one line for each row. It returns false if the lines do not fit.
func wide(text *strings.Builder, rows []row, namespaces, rates bool, s style) bool {
	type column struct {
		title string
		cell  func(*row) string
		right bool
		shown bool
		width int
	}
	columns := []column{
		{title: "ADDRESS", cell: func(r *row) string { return r.address }, shown: true},
		{title: "PROCESS", cell: func(r *row) string { return r.process }, shown: true},
		{title: "QUEUED", cell: func(r *row) string { return r.bar + " " + r.queued }, shown: true},
		{title: "LIMIT", cell: func(r *row) string { return r.limit }, right: true, shown: true},
		{title: "DROPS", cell: func(r *row) string { return r.drops }, right: true, shown: true},
		{title: "DROPS/S", cell: func(r *row) string { return r.rate }, right: true, shown: rates},
		{title: "NAMESPACE", cell: func(r *row) string { return r.namespace }, shown: namespaces},
	}
	const gap = 2
	total := -gap
	for i := range columns {
		c := &columns[i]
		if !c.shown {
			continue
		}
		c.width = len(c.title)
		for j := range rows {
			c.width = max(c.width, utf8.RuneCountInString(c.cell(&rows[j])))
		}
		total += c.width + gap
	}
	if s.width > 0 && total > s.width {
		return false
	}
	const spaces = "                                                                                "
	pad := func(n int) {
		for ; n > 0; n -= len(spaces) {
			text.WriteString(spaces[:min(n, len(spaces))])
		}
	}
	line := func(on, off string, cell func(c *column) string) {
		text.WriteString(on)
		due := 0 // spaces, which are not written at the end of a line
		for i := range columns {
			c := &columns[i]
			if !c.shown {
				continue
			}
			value := cell(c)
			free := c.width - utf8.RuneCountInString(value)
			if c.right {
				due, free = due+free, 0
			}
			if value != "" {
				pad(due)
				text.WriteString(value)
				due = 0
			}
			due += free + gap
		}
		text.WriteString(off)
		text.WriteByte('\n')
	}
	text.Grow((len(rows) + 1) * (total + 1))
	line("", "", func(c *column) string { return c.title })
	for i := range rows {
		r := &rows[i]
		on, off := s.paint(r.used)
		line(on, off, func(c *column) string { return c.cell(r) })
	}
	return true
}

// narrow writes a few short lines for each row.
func narrow(text *strings.Builder, rows []row, rates bool, s style) {
	for _, r := range rows {
		drops := "drops " + r.drops
		if rates {
			drops += " (" + r.rate + "/s)"
		}
		lines := []string{r.address, "  " + r.process, "  " + r.bar + " " + r.queued, "  limit " + r.limit + ", " + drops}
		if r.namespace != "" {
			lines = append(lines, "  in "+r.namespace)
		}
		for i, line := range lines {
			lines[i] = fold(line, s.width)
		}
		on, off := s.paint(r.used)
		text.WriteString(on + strings.Join(lines, "\n") + off + "\n")
	}
}

// nearlyFull is the utilization from which a queue is reported.
const nearlyFull = 0.8

// paint returns what begins and ends the color of a row.
func (s style) paint(used float64) (on, off string) {
	switch {
	case !s.color || used < nearlyFull:
		return "", ""
	case used < 1:
		return "\x1b[33m", "\x1b[0m"
	}
	return "\x1b[31m", "\x1b[0m"
}

const barWidth = 10

// bar shows the utilization. Only a queue that is full has a full bar, and only an empty one
// an empty bar.
func bar(s acceptq.Stats) string {
	part, known := s.Utilization()
	if !known {
		return "[" + strings.Repeat("?", barWidth) + "]"
	}
	n := min(int(part*barWidth), barWidth)
	if part > 0 {
		n = max(n, 1)
	}
	const full, empty = "##########", "          "
	return "[" + full[:n] + empty[n:] + "]"
}

// number returns a number, or "-" if it is unknown.
func number(n int64) string {
	if n == unknown {
		return "-"
	}
	return strconv.FormatInt(n, 10)
}

// fold breaks a text into lines of at most width runes, between words if it can.
func fold(text string, width int) string {
	if width <= 0 || utf8.RuneCountInString(text) <= width {
		return text
	}
	runes := []rune(text)
	var lines []string
	for len(runes) > width {
		cut, next := width, width
		for i := width; i > width/2; i-- {
			if runes[i] == ' ' {
				cut, next = i, i+1
				break
			}
		}
		lines = append(lines, string(runes[:cut]))
		runes = runes[next:]
	}
	return strings.Join(append(lines, string(runes)), "\n")
}

// A jsonReading is a reading in JSON. Names may be added, and none is removed.
type jsonReading struct {
	Time      time.Time      `json:"time"`
	Listeners []jsonListener `json:"listeners"`
	Complete  bool           `json:"complete"`
	Notes     []string       `json:"notes,omitempty"`
}

type jsonListener struct {
	*listener
	Namespace      string   `json:"namespace"`
	DropsPerSecond *float64 `json:"dropsPerSecond,omitempty"`
}

// asJSON returns a reading as a JSON object, on one line if the object is one of several.
func asJSON(now reading, before *reading, oneLine bool) (string, error) {
	since := ratesSince(before, now)
	j := jsonReading{Time: now.at, Listeners: []jsonListener{}, Complete: now.complete, Notes: now.notes}
	for _, at := range now.groups() {
		for _, member := range at.group {
			l := jsonListener{listener: member, Namespace: at.namespace}
			if n := since.of(l.listener); n != unknown {
				l.DropsPerSecond = &n
			}
			j.Listeners = append(j.Listeners, l)
		}
	}
	text, err := json.Marshal(j)
	if err == nil && !oneLine {
		text, err = json.MarshalIndent(j, "", "  ")
	}
	return string(text) + "\n", err
}
