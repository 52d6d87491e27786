package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
)

// looks is how often per second the queue is read. A terminal is updated each time;
// other output gets one line for each second.
const looks = 10

// watch shows the queue until ctx ends, and then a summary. It returns the first error
// of writing to out.
func watch(ctx context.Context, out *bufio.Writer, terminal bool, ln *acceptq.Listener, served *atomic.Int64) (err error) {
	defer func() {
		if ferr := out.Flush(); err == nil {
			err = ferr
		}
	}()
	v := view{color: terminal && os.Getenv("NO_COLOR") == ""}
	if terminal {
		fmt.Fprint(out, "\x1b[?25l")       // hide the cursor
		defer fmt.Fprint(out, "\x1b[?25h") // show it again
	}
	account := ln.Backlog()
	first, firstErr := ln.Stats() // for a run that ends before the first tick
	tick := time.NewTicker(time.Second / looks)
	defer tick.Stop()
	for {
		if err := out.Flush(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			if v.n == 0 && firstErr == nil {
				v.look(first)
			}
			if terminal {
				fmt.Fprintln(out)
			}
			fmt.Fprintf(out, "\n%d served, %s\n", served.Load(), v.summary())
			return nil
		case <-tick.C:
		}
		s, err := ln.Stats()
		if errors.Is(err, net.ErrClosed) {
			continue // ctx ends next
		}
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		v.look(s)
		// Report a change of the ceiling.
		if now := ln.Backlog(); now != account {
			account = now
			if terminal {
				fmt.Fprint(out, "\r\x1b[K")
			}
			fmt.Fprintln(out, account)
		}
		switch {
		case terminal:
			// On a narrow terminal the line is cut off instead of wrapped.
			fmt.Fprint(out, "\r\x1b[K\x1b[?7l", v.bar(account), "\x1b[?7h")
		case v.n%looks == 0:
			fmt.Fprintf(out, "%4ds  %s, %d served\n", v.n/looks, v.line(account), served.Load())
		}
	}
}

// A view collects what the looks have shown so far.
type view struct {
	color bool
	n     int           // looks
	now   acceptq.Stats // the last look
	drops []int64       // during the last second, the oldest first
	first int64         // the drops at the first look
	peak  int           // the longest queue
	full  int           // number of looks at which the queue was full
	long  int           // number of looks at which only the length was unknown
	trail []rune        // the longest queue of each half second, the newest last
}

func (v *view) look(s acceptq.Stats) {
	if v.n == 0 {
		v.first = s.Drops
		v.trail = []rune(strings.Repeat(" ", 16))
	}
	if v.n%(looks/2) == 0 {
		v.trail = append(v.trail[1:], ' ')
	}
	v.n++
	v.now = s
	v.drops = append(v.drops, s.Drops)
	if len(v.drops) > looks+1 {
		v.drops = v.drops[1:]
	}
	v.peak = max(v.peak, s.Queued)
	if v.tooLong() {
		v.long++
	}
	part, known := s.Utilization()
	if !known || part == 0 {
		return
	}
	if part >= 1 {
		v.full++
	}
	heights := []rune("▁▂▃▄▅▆▇█")
	last := &v.trail[len(v.trail)-1]
	*last = max(*last, heights[min(int(part*float64(len(heights))), len(heights)-1)])
}

// dropsPerSecond formats the difference to the look of a second ago. The kernel's
// counter has 32 bits and wraps around.
func (v *view) dropsPerSecond() string {
	if v.now.Drops < 0 {
		return "drops unknown"
	}
	return fmt.Sprintf("drops %3d/s", uint32(v.now.Drops)-uint32(v.drops[0]))
}

// notes returns remarks in addition to the numbers.
func (v *view) notes(b acceptq.Backlog) string {
	var notes []string
	if part, known := v.now.Utilization(); known && part >= 1 {
		notes = append(notes, "FULL")
	}
	if b.Clamped() {
		notes = append(notes, fmt.Sprintf("clamped: asked %d", b.Requested))
	}
	return strings.Join(notes, ", ")
}

// tooLong reports whether the length of the queue is unknown, but not its capacity. DragonFly
// does not report the length of a long queue.
func (v *view) tooLong() bool { return v.now.Queued < 0 && v.now.Capacity >= 0 }

// line describes the last look in words.
func (v *view) line(b acceptq.Backlog) string {
	part, known := v.now.Utilization()
	if v.tooLong() {
		return fmt.Sprintf("more queued than this system reports, of %d (limit %d), %s", v.now.Capacity, v.now.Limit, v.dropsPerSecond())
	}
	if !known {
		return "the queue is unknown: this system does not report it"
	}
	s := fmt.Sprintf("%*d queued of %d (limit %d) %3.0f%%, %s",
		len(fmt.Sprint(v.now.Capacity)), v.now.Queued, v.now.Capacity, v.now.Limit, 100*part, v.dropsPerSecond())
	if notes := v.notes(b); notes != "" {
		s += ", " + notes
	}
	return s
}

// bar draws the last look as a bar.
func (v *view) bar(b acceptq.Backlog) string {
	const width = 24
	part, known := v.now.Utilization()
	if !known {
		return v.line(b)
	}
	color, plain := "", ""
	if v.color {
		plain = "\x1b[0m"
		switch {
		case part >= 1:
			color = "\x1b[31m" // red
		case part > 0.8:
			color = "\x1b[33m" // yellow
		default:
			color = "\x1b[32m" // green
		}
	}
	return fmt.Sprintf(" %*d of %d ▕%s%s%s▏%4.0f%%  %s  %s%s%s  %s",
		len(fmt.Sprint(v.now.Capacity)), v.now.Queued, v.now.Capacity,
		color, blocks(part, width), plain, 100*part, v.dropsPerSecond(),
		color, string(v.trail[:]), plain, v.notes(b))
}

// blocks fills a share of width cells, accurate to an eighth of a cell.
func blocks(part float64, width int) string {
	eighths := int(min(part, 1)*float64(8*width) + 0.5)
	s := strings.Repeat("█", eighths/8)
	if eighths%8 > 0 {
		s += string([]rune(" ▏▎▍▌▋▊▉")[eighths%8])
	}
	return s + strings.Repeat(" ", width-(eighths+7)/8)
}

// summary describes the whole run in words.
func (v *view) summary() string {
	if v.long > 0 {
		return fmt.Sprintf("maximum unknown: more queued than this system reports for %d%% of the time", 100*v.long/v.n)
	}
	if _, known := v.now.Utilization(); !known {
		return "queue unknown: this system does not report it"
	}
	s := fmt.Sprintf("maximum %d queued of %d, full for %d%% of the time",
		v.peak, v.now.Capacity, 100*v.full/v.n)
	if v.now.Drops < 0 {
		return s + ", drops unknown"
	}
	return s + fmt.Sprintf(", %d packets dropped", uint32(v.now.Drops)-uint32(v.first))
}
