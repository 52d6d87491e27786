//go:build linux

package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/acceptq/acceptq/bench/internal/page"
	"github.com/acceptq/acceptq/bench/internal/picture"
)

// written names this program in the pages that it writes.
const written = "go run -C bench . -draw"

// writeReadmes writes all tables to README.md, and the short one to the README of
// the repository.
func writeReadmes(goals []goal) error {
	if err := page.Write("README.md", written, longText(goals)); err != nil {
		return err
	}
	return page.Write("../README.md", written, shortText(goals))
}

// provenance says where the figures of m come from, and whether the measured code has
// changed since.
func (m *measurement) provenance() string {
	s := fmt.Sprintf("%s, commit %s; %s (%s)", m.meta["date"], m.meta["commit"], m.meta["machine"], m.meta["cpu"])
	if m.meta["short"] != "" {
		s += "; a short run, whose figures are worth nothing"
	}
	if why := m.outdated(); why != "" {
		s += "; † " + why
	}
	return s
}

// ran is the number of rounds.
func (m *measurement) ran() (rounds int) {
	for _, v := range m.figures {
		rounds = max(rounds, len(v))
	}
	return rounds
}

// mark returns the mark for a figure that is older than the measured code.
func (m *measurement) mark() string {
	if m.outdated() != "" {
		return " †"
	}
	return ""
}

// longText returns every table and the verdicts of the goals.
func longText(goals []goal) string {
	var b strings.Builder
	for _, m := range measurements {
		if len(m.figures) == 0 {
			continue
		}
		if m.picture != "" {
			b.WriteString(picture.Link("results/"+m.picture, m.alt) + "\n\n")
		}
		note := ""
		for _, t := range m.tables {
			fmt.Fprintf(&b, "### %s%s\n\n|", t.title, m.mark())
			rule := "|\n| ---"
			for _, c := range t.columns {
				b.WriteString(" | " + c.name)
				rule += " | ---"
				if c.base != "" {
					b.WriteString(" | × " + c.base)
					rule += " | ---"
				}
			}
			b.WriteString(" " + rule + " |\n")
			for _, row := range t.rows {
				b.WriteString("| " + row)
				for _, c := range t.columns {
					b.WriteString(" | " + cell(samples(t.bench, row, c.unit), c.unit))
					if c.base != "" {
						b.WriteString(" | " + against(t.bench, row, c.base, c.unit))
					}
				}
				b.WriteString(" |\n")
			}
			b.WriteString("\n")
			if t.note != "" && t.note != note {
				b.WriteString(t.note + "\n\n")
			}
			note = t.note
		}
		if retry := m.meta["tcp_syn_linear_timeouts"]; m.name == "burst" || m.name == "restart" {
			fmt.Fprintf(&b, "%s\n\n", retryStory(retry))
		}
		fmt.Fprintf(&b, "%s. Rounds: %d. Load average: %s.\n\n", m.provenance(), m.ran(), m.meta["load"])
	}
	b.WriteString("### Goals\n\n| Goal | Measured | Verdict |\n| --- | --- | --- |\n")
	for _, g := range goals {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", g.text, g.figure, g.verdict)
	}
	return b.String()
}

// retryStory says when this kernel retransmits the SYN of a client.
func retryStory(linear string) string {
	n, err := strconv.Atoi(linear)
	if err != nil {
		return "This kernel has no net.ipv4.tcp_syn_linear_timeouts: it retransmits a SYN after 1, 3, 7, 15, ... s."
	}
	at, wait, list := 0, 1, ""
	for i := range n + 3 {
		if i > n {
			wait *= 2
		}
		at += wait
		list += strconv.Itoa(at) + ", "
	}
	return "net.ipv4.tcp_syn_linear_timeouts is " + linear + ": this kernel retransmits a SYN after " + list + "... s."
}

// against writes the ratio of a figure to that of the base, and "undecided" if a U
// test cannot tell the two apart.
func against(bench, row, base, unit string) string {
	own, other := samples(bench, row, unit), samples(bench, base, unit)
	text := cell(ratios(own, other), "×")
	if len(own) > 1 && !slices.Equal(own, other) && atMost(own, 1, other) == undecided {
		text += ", undecided"
	}
	return text
}

// shortText returns the table for the README of the repository: five lines, compared
// with net.Listen.
func shortText(goals []goal) string {
	var b strings.Builder
	var missing []string
	sources := map[string][]string{}
	for _, m := range measurements {
		switch {
		case m.ran() == 0:
			missing = append(missing, m.name)
			continue
		case m.name == "burst" || m.name == "restart":
			b.WriteString(picture.Link("bench/results/"+m.picture, m.alt) + "\n\n")
		}
		sources[m.provenance()] = append(sources[m.provenance()], m.name)
	}
	if len(sources) == 0 {
		return "Not measured at present.\n"
	}
	b.WriteString("| | acceptq | compared with | ratio |\n| --- | --- | --- | --- |\n")
	of := map[string]*measurement{}
	for _, m := range measurements {
		of[m.name] = m
	}
	for _, line := range []struct {
		what, measurement, bench, own, base, baseName, unit string
	}{
		{"CPU time of `Listen` and `Close`", "listen", "Listen/addr=literal", ours, netDefault, "`net.Listen`", cpu},
		{"CPU time of a net/http request over a new connection, its client included", "accept", "HTTP", ours, netDefault, "`net.Listen`", cpu},
		{"Go's heap that an open listener keeps", "memory", "Memory", ours, netDefault, "`net.Listen`", kept},
		{"5,000 clients at once, somaxconn 128: time to the first byte, p99, 64 shards", "burst", "Burst", manyQueues, netDefault, "`net.Listen`", p99},
		{"Requests lost in a restart under load, in which the next process listens before this one stops: `Drain`", "restart", "Restart/clients=busy", restartOurs, restartBeside, "`Shutdown` alone", "lost"},
	} {
		own, other := samples(line.bench, line.own, line.unit), samples(line.bench, line.base, line.unit)
		if len(own) > 0 && len(other) > 0 {
			fmt.Fprintf(&b, "| %s%s | %s | %s: %s | %s |\n", line.what, of[line.measurement].mark(),
				cell(own, line.unit), line.baseName, cell(other, line.unit), against(line.bench, line.own, line.base, line.unit))
		}
	}
	b.WriteString("\nMedians; the brackets hold the smallest and the largest round. \"Undecided\" means that a U test cannot tell the two apart.\n")
	for _, v := range []verdict{fallsShort, undecided} {
		var list string
		for _, g := range goals {
			if g.verdict == v {
				list += fmt.Sprintf("- %s: %s\n", g.text, g.figure)
			}
		}
		if list != "" {
			fmt.Fprintf(&b, "\nGoals with the verdict \"%s\":\n\n%s", v, list)
		}
	}
	b.WriteString("\nMeasured:\n\n")
	for _, source := range slices.Sorted(maps.Keys(sources)) {
		fmt.Fprintf(&b, "- %s: %s.\n", strings.Join(sources[source], ", "), source)
	}
	if missing != nil {
		fmt.Fprintf(&b, "- Not measured at present: %s.\n", strings.Join(missing, ", "))
	}
	return b.String()
}
