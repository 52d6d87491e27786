//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/acceptq/acceptq/bench/internal/picture"
)

const barsNote = "Each bar and number is the median of %d rounds. The line goes from the smallest round to the largest."

// pictures are the pictures by their name, which that of a measurement has.
var pictures = map[string]func(rounds int) picture.Bars{
	"burst": func(rounds int) picture.Bars {
		return picture.Bars{
			Title: "5,000 clients at once: who is let in, and how long the others wait",
			Notes: []string{"The server is stopped for 0.5 s; net.core.somaxconn is 128. At once: no packet was retransmitted. No client gives up within a minute.",
				fmt.Sprintf("Each bar, point and number is the median of %d rounds. The line goes from the smallest round to the largest. The time has a logarithmic scale.", rounds)},
			Rows: names(bursts),
			Panels: []picture.Panel{
				panel("Clients let in at once", "at-once", names(bursts), func(row string) []float64 { return samples("Burst", row, "at-once") }),
				logarithmic(panel("Time to the first byte, 99th percentile", p99, names(bursts), func(row string) []float64 { return samples("Burst", row, p99) })),
			},
		}
	},
	"restart": func(rounds int) picture.Bars {
		c := picture.Bars{
			Title: "One replica restarts under load: requests that are lost, refused or stalled",
			Notes: []string{"64 clients that never rest. Lost: reset, cut, or no answer in 20 s. Refused: nobody listened. Stalled: answered, but only after a retransmission.",
				fmt.Sprintf("Each bar and number is the median of %d restarts. The line goes from the smallest to the largest; an arrow goes further. The panels share a scale.", rounds),
				"Wait: until every accepted connection has had its first answer. " + restartNote},
			Rows: names(restarts), Shared: true,
		}
		for _, result := range []struct {
			title string
			unit  string
			ink   picture.Ink
		}{{"Lost", "lost", picture.Red}, {"Refused", "refused", picture.Brown}, {"Stalled", "stalled", picture.Yellow}} {
			p := panel(result.title, result.unit, names(restarts), func(row string) []float64 { return samples(restartBench(1, "busy"), row, result.unit) })
			for i := range p.Bars {
				p.Bars[i].Ink = result.ink
			}
			c.Panels = append(c.Panels, p)
		}
		return c
	},
	"speed": func(rounds int) picture.Bars {
		c := picture.Bars{
			Title: "CPU time as a multiple of net.Listen's",
			Notes: []string{"All panels have the same scale. The second row is net.Listen again: its distance from 1 is noise. The times of net/http include the clients.",
				fmt.Sprintf(barsNote, rounds)},
			Rows: peerNames, Shared: true,
		}
		for _, p := range []struct{ title, bench string }{{"Listen on\n127.0.0.1:0", "Listen/addr=literal"}, {"Listen on :0", "Listen/addr=wildcard"}, {"Accept", "Accept"}, {"net/http,\none request", "HTTP"}} {
			c.Panels = append(c.Panels, panel(p.title, "×", peerNames, func(row string) []float64 {
				return ratios(samples(p.bench, row, cpu), samples(p.bench, netDefault, cpu))
			}))
		}
		return c
	},
	"read": func(rounds int) picture.Bars {
		c := picture.Bars{
			Title: "The time of one reading of an accept queue",
			Notes: []string{fmt.Sprintf("All panels have the same logarithmic scale. Each point and number is the median of %d rounds. The line goes from the smallest round to the largest.", rounds)},
			Rows:  readerNames, Shared: true,
		}
		for _, size := range readSizes {
			c.Panels = append(c.Panels, logarithmic(panel("With "+strconv.Itoa(size)+" other\nTCP sockets", "ns", readerNames,
				func(row string) []float64 { return samples(readBench(size), row, "ns/op") })))
		}
		return c
	},
}

// panel makes a panel with a bar for each row.
func panel(title, unit string, rows []string, figures func(row string) []float64) picture.Panel {
	p := picture.Panel{Title: title, Format: func(v float64) string { return format(v, unit) }}
	for _, row := range rows {
		ink := picture.Others
		if strings.HasPrefix(row, ours) {
			ink = picture.Ours
		}
		p.Bars = append(p.Bars, picture.Bar{Rounds: figures(row), Ink: ink})
	}
	return p
}

func logarithmic(p picture.Panel) picture.Panel {
	p.Log = true
	return p
}

// drawAll draws the pictures of all measurements that have results, and the dark form of
// the drawing in docs/queues.svg.
func drawAll(dir string) error {
	for _, m := range measurements {
		if m.picture == "" || m.ran() == 0 {
			continue
		}
		svg, err := pictures[m.picture](m.ran()).Draw()
		if err != nil {
			return err
		}
		if err := picture.Write(filepath.Join(dir, m.picture), svg); err != nil {
			return err
		}
	}
	return nil
}

// darkenQueues writes the dark form of docs/queues.svg, which is drawn by hand.
func darkenQueues() error {
	svg, err := os.ReadFile("../docs/queues.svg")
	if err != nil {
		return err
	}
	return picture.Write("../docs/queues", svg)
}
