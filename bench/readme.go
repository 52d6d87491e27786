//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
)

// What stands between these two lines of a file is written from the results.
const (
	readmeBegin = "<!-- written by: go run -C bench . -readme ../README.md -->\n"
	readmeEnd   = "<!-- end of what is written -->\n"
)

func writeReadme(name string, r *Report) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, begun := strings.Cut(string(text), readmeBegin)
	_, after, ended := strings.Cut(rest, readmeEnd)
	if !begun || !ended {
		return fmt.Errorf("%s has no lines %q and %q", name, readmeBegin, readmeEnd)
	}
	return os.WriteFile(name, []byte(before+readmeBegin+readmeText(r)+readmeEnd+after), 0o666)
}

// readmeText is the figures that matter, one line for each question. What was not
// measured has no line.
func readmeText(r *Report) string {
	var b strings.Builder
	var loads []string
	for _, res := range r.Results {
		loads = append(loads, res.Name+" "+res.Load)
	}
	fmt.Fprintf(&b, "\n%s. Medians of at least %d rounds, and where it matters the quartiles. The machine's load: %s.\n\n",
		r.Machine, leastRounds(r), strings.Join(loads, "; "))
	b.WriteString("| | acceptq | beside it |\n| --- | --- | --- |\n")
	row := func(what, own, others string) { fmt.Fprintf(&b, "| %s | %s | %s |\n", what, own, others) }
	median := func(t *Table, label, column string) string {
		for _, c := range t.Columns {
			if s := t.cell(label, column); s != nil && c.Name == column {
				return format(s.Median, c.Unit)
			}
		}
		return "unknown"
	}
	for _, q := range []struct{ result, table, what string }{
		{"listen", "literal", "Listen and Close with a host, CPU time × net.Listen"},
		{"listen", "wildcard", "Listen and Close without, CPU time × net.Listen"},
		{"accept", "accept", "Accept, CPU time × net.Listen"},
		{"accept", "http", "net/http, one request for each connection, CPU time × net.Listen"},
	} {
		if t := r.table(q.result, q.table); t != nil {
			const column = "CPU × net.Listen"
			beside := fmt.Sprintf("net.Listen again %s; net's plain TCP %s", t.cell(netAgain, column).format("×"), median(t, netPlain, column))
			if t.row(handMade) != nil {
				beside += "; " + handMade + " " + median(t, handMade, column)
			}
			row(q.what, t.cell(ours, column).format("×"), beside)
		}
	}
	if t := r.table("queue", "queue"); t != nil {
		for _, size := range []string{"10", "1000", "10000"} {
			var others []string
			for _, q := range t.Rows[2:] {
				others = append(others, q.Label+" "+median(t, q.Label, size))
			}
			row("Reading the queue beside "+size+" sockets", median(t, t.Rows[0].Label, size), strings.Join(others, ", "))
		}
	}
	if t := r.table("burst", "burst"); t != nil {
		say := func(label string) string {
			return fmt.Sprintf("%s: %s at once, p99 %s", strings.TrimPrefix(label, "acceptq, "), median(t, label, "at once"), median(t, label, "first byte, p99"))
		}
		row("Burst, "+t.Title, say("acceptq, 64 shards")+"; "+say("acceptq, 1 shard"), say(netDefault))
	}
	for _, load := range []struct{ table, what string }{{"busy", "busy clients"}, {"calm", "calm clients"}} {
		if t := r.table("restart", load.table); t != nil {
			say := func(label string) string {
				_, how, _ := strings.Cut(label, ": ")
				return fmt.Sprintf("%s: %s lost, %s stalled", how, median(t, label, "lost"), median(t, label, "stalled"))
			}
			row("A restart, "+load.what, say(restartRecipe), "net.Listen, "+say(restarters[0].name)+"; "+say(restarters[2].name))
		}
	}
	if t := r.table("cost", "memory"); t != nil {
		say := func(label string) string {
			return fmt.Sprintf("%s in %s allocations, %s kept", median(t, label, "allocated"), median(t, label, "allocations"), median(t, label, "kept while open"))
		}
		row("Go's heap for a listener", say(ours), netDefault+": "+say(netDefault))
	}
	if t := r.table("cost", "programs"); t != nil && len(t.Rows) > 0 {
		row("The program grows by", fmt.Sprintf("%s; with net/http in it %s", median(t, ours, "more than net"), median(t, "acceptq with net/http", "more than net")),
			"tcplisten "+median(t, "valyala/tcplisten", "more than net")+", go-reuseport "+median(t, "libp2p/go-reuseport", "more than net"))
	}
	b.WriteString("\n")
	return b.String()
}

func leastRounds(r *Report) int {
	least := 0
	for i, res := range r.Results {
		if i == 0 || res.Rounds < least {
			least = res.Rounds
		}
	}
	return least
}
