package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
)

// A style is how the output is shown.
type style struct {
	width  int      // of the terminal; 0 is a pipe or a file, whose lines have any length
	height int      // of the terminal; 0 is unknown
	color  bool     // colors are shown
	screen bool     // the screen can be cleared
	window *os.File // the terminal, whose size can change; nil is a pipe or a file
}

// terminal returns the style of a file.
func terminal(f *os.File) style {
	width, height := windowSize(f)
	if width == 0 {
		return style{}
	}
	plain := os.Getenv("TERM") == "dumb"
	return style{width: width, height: height, color: os.Getenv("NO_COLOR") == "" && !plain, screen: !plain, window: f}
}

// now returns the style with the current size of the terminal.
func (s style) now() style {
	if s.window == nil {
		return s
	}
	return terminal(s.window)
}

// top returns the first lines of a text that fit on the screen. Otherwise the screen would show
// the last ones, and those are the queues that are empty.
func (s style) top(text string) string {
	const end = 2 // the line below, and that of the cursor
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	if s.height <= end || len(lines) < s.height {
		return text
	}
	off := ""
	if s.color {
		off = "\x1b[0m"
	}
	shown := s.height - end
	return strings.Join(lines[:shown], "") + off + fmt.Sprintf("and %s\n", count(len(lines)-shown, "line more", "lines more"))
}

// A listing says what the table shows.
type listing struct {
	all, watch, json bool
	unnamed          bool // without processes
	every            time.Duration
}

// list shows the table, once or until ctx ends.
func list(ctx context.Context, s style, l listing, out io.Writer) error {
	if l.watch { // a signal is the way to end, and no failure
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
	}
	var before *reading
	for {
		now, err := read(ctx, question{all: l.all, unnamed: l.unnamed, before: before})
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
			s = s.now()
			text = table(now, before, l.watch, s)
			switch {
			case l.watch && s.screen:
				text = "\x1b[H\x1b[2J" + s.top(text)
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

// The columns of the table.
const (
	columnAddress = iota
	columnProcess
	columnQueued
	columnLimit
	columnDrops
	columnRate
	columnNamespace
	columns
)

// A grid holds the cells of a table. They are in one piece of memory, because a machine can
// have thousands of listeners.
type grid struct {
	text  []byte
	ends  []int     // of each cell in text
	used  []float64 // the utilization of each row
	shown [columns]bool
}

// end ends a cell.
func (g *grid) end() { g.ends = append(g.ends, len(g.text)) }

func (g *grid) rows() int { return len(g.ends) / columns }

func (g *grid) cell(row, column int) []byte {
	i, begin := row*columns+column, 0
	if i > 0 {
		begin = g.ends[i-1]
	}
	return g.text[begin:g.ends[i]]
}

// titles begins a grid with the names of its columns.
func (g *grid) titles() {
	for _, title := range [columns]string{"ADDRESS", "PROCESS", "QUEUED", "LIMIT", "DROPS", "DROPS/S", "NAMESPACE"} {
		g.text = append(g.text, title...)
		g.end()
	}
	g.used = append(g.used, 0)
}

// add adds a listener, the nth of a group.
func (g *grid) add(l *listener, namespace string, nth, members int, rate float64) {
	g.text = l.appendAddress(g.text)
	if members > 1 {
		g.text = fmt.Appendf(g.text, " (%d of %d)", nth, members)
	}
	g.end()
	g.text = appendProcesses(g.text, l.Processes)
	g.end()
	g.text = append(append(g.text, bar(l.Stats)...), ' ')
	g.text = append(appendNumber(g.text, int64(l.Stats.Queued)), '/')
	g.text = appendNumber(g.text, int64(l.Stats.Capacity))
	g.end()
	g.text = appendNumber(g.text, int64(l.Stats.Limit))
	g.end()
	g.text = appendNumber(g.text, l.Stats.Drops)
	g.end()
	if rate == unknown {
		g.text = append(g.text, '-')
	} else {
		g.text = strconv.AppendFloat(g.text, rate, 'f', 1, 64)
	}
	g.end()
	g.text = append(g.text, namespace...)
	g.end()
	g.used = append(g.used, used(l.Stats))
}

// table returns the table as text. With rates it has the drops per second since before.
func table(now reading, before *reading, rates bool, s style) string {
	since := ratesSince(before, now)
	all := now.groups()
	named := !now.processesAt.IsZero()
	g := grid{shown: [columns]bool{true, named, true, true, true, rates, len(now.namespaces) > 1}}
	g.text = make([]byte, 0, 80*(now.count()+1))
	g.ends = make([]int, 0, columns*(now.count()+1))
	g.titles()
	unnamed := false
	for _, at := range all {
		for i, l := range at.group {
			g.add(l, at.namespace, i+1, len(at.group), since.of(l))
			unnamed = unnamed || len(l.Processes) == 0
		}
	}
	var text []byte
	if g.rows() == 1 {
		text = append(text, "Nothing listens here.\n"...)
	} else if text = g.wide(s); text == nil {
		text = g.narrow(s)
	}
	for _, note := range notes(now, unnamed && named) {
		text = append(text, "\n"+fold(note, s.width)+"\n"...)
	}
	return string(text)
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
	return slices.Concat(all, r.notes, r.unread)
}

// wide returns one line for each row. It returns nil if the lines do not fit.
func (g *grid) wide(s style) (text []byte) {
	const gap = 2
	var widths [columns]int
	total := 0
	for column, shown := range g.shown {
		if !shown {
			continue
		}
		for row := range g.rows() {
			widths[column] = max(widths[column], utf8.RuneCount(g.cell(row, column)))
		}
		total += widths[column] + gap
	}
	if s.width > 0 && total-gap > s.width {
		return nil
	}
	text = make([]byte, 0, g.rows()*(total+1)+100)
	for row := range g.rows() {
		on, off := s.paint(g.used[row])
		text = append(text, on...)
		due := 0 // spaces, which are not written at the end of a line
		for column, shown := range g.shown {
			if !shown {
				continue
			}
			cell := g.cell(row, column)
			free := widths[column] - utf8.RuneCount(cell)
			if column == columnLimit || column == columnDrops || column == columnRate {
				due, free = due+free, 0
			}
			if len(cell) > 0 {
				for ; due > 0; due-- {
					text = append(text, ' ')
				}
				text = append(text, cell...)
			}
			due += free + gap
		}
		text = append(append(text, off...), '\n')
	}
	return text
}

// narrow returns a few short lines for each row.
func (g *grid) narrow(s style) (text []byte) {
	for row := 1; row < g.rows(); row++ {
		cell := func(column int) string { return string(g.cell(row, column)) }
		drops := "drops " + cell(columnDrops)
		if g.shown[columnRate] {
			drops += " (" + cell(columnRate) + "/s)"
		}
		lines := []string{cell(columnAddress)}
		if g.shown[columnProcess] {
			lines = append(lines, "  "+cell(columnProcess))
		}
		lines = append(lines, "  "+cell(columnQueued), "  limit "+cell(columnLimit)+", "+drops)
		if name := cell(columnNamespace); name != "" {
			lines = append(lines, "  in "+name)
		}
		for i, line := range lines {
			lines[i] = fold(line, s.width)
		}
		on, off := s.paint(g.used[row])
		text = append(text, on+strings.Join(lines, "\n")+off+"\n"...)
	}
	return text
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

// bar shows the utilization. Only a queue that is full has a full bar, and only an empty one
// an empty bar.
func bar(s acceptq.Stats) string {
	part, known := s.Utilization()
	if !known {
		return "[??????????]"
	}
	const bars = "[          ][#         ][##        ][###       ][####      ][#####     ]" +
		"[######    ][#######   ][########  ][######### ][##########]"
	const width = len("[##########]")
	n := min(int(part*10), 10)
	if part > 0 {
		n = max(n, 1)
	}
	return bars[n*width:][:width]
}

// appendNumber appends a number, or "-" if it is unknown.
func appendNumber(text []byte, n int64) []byte {
	if n == unknown {
		return append(text, '-')
	}
	return strconv.AppendInt(text, n, 10)
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
	acceptq.Queue
	Processes      []observe.Process `json:"processes"` // null if none is known, and with -n
	Namespace      string            `json:"namespace"` // "" is the namespace of the command
	DropsPerSecond *float64          `json:"dropsPerSecond,omitempty"`
}

// asJSON returns a reading as a JSON object, on one line if the object is one of several.
func asJSON(now reading, before *reading, oneLine bool) (string, error) {
	since := ratesSince(before, now)
	j := jsonReading{Time: now.at, Listeners: []jsonListener{}, Complete: now.complete, Notes: slices.Concat(now.notes, now.unread)}
	for _, at := range now.groups() {
		for _, member := range at.group {
			l := jsonListener{Queue: member.Queue, Processes: member.Processes, Namespace: at.namespace}
			if n := since.of(member); n != unknown {
				l.DropsPerSecond = &n
			}
			j.Listeners = append(j.Listeners, l)
		}
	}
	text, err := json.Marshal(j)
	if err == nil && !oneLine {
		text, err = json.MarshalIndent(j, "", "  ")
	}
	return controls.Replace(string(text)) + "\n", err
}

// controls escapes the control characters that JSON allows in a string. A terminal may obey them.
var controls = func() *strings.Replacer {
	var pairs []string
	for r := rune(0x7f); r < 0xa0; r++ {
		pairs = append(pairs, string(r), fmt.Sprintf("\\u%04x", r))
	}
	return strings.NewReplacer(pairs...)
}()
