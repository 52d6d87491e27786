//go:build linux

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/acceptq/acceptq/bench/internal/page"
	"github.com/acceptq/acceptq/bench/internal/picture"
)

// written names this program in the pages that it writes.
const written = "go run -C bench . -draw"

// writeReadme writes everything that is measured to README.md.
func writeReadme(goals []goal) error { return page.Write("README.md", written, text(goals)) }

// provenance returns the row of the table that says where the figures of m come from,
// and whether the measured code has changed since.
func (m *measurement) provenance() string {
	if m.ran() == 0 {
		return fmt.Sprintf("| %s | not measured at present | | | | | |\n", m.name)
	}
	date := m.meta["date"]
	if m.meta["short"] != "" {
		date += ", a short run, whose figures are worth nothing"
	}
	return fmt.Sprintf("| %s | %s | %s | %s (%s) | %d | %s | %s |\n",
		m.name, date, m.meta["commit"], m.meta["machine"], m.meta["cpu"], m.ran(), m.meta["load"], m.outdated())
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

// text returns the verdicts of the goals, every picture and every table.
func text(goals []goal) string {
	var b strings.Builder
	b.WriteString("### Goals\n\n| Goal | Measured | Verdict |\n| --- | --- | --- |\n")
	for _, g := range goals {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", g.text, g.figure, g.verdict)
	}
	b.WriteString("\n### When and where\n\n| | date | commit | machine | rounds | load average | † the measured code |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, m := range measurements {
		b.WriteString(m.provenance())
	}
	b.WriteString("\n")
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
		if retry := m.meta["tcp_syn_linear_timeouts"]; m.name == "burst" {
			fmt.Fprintf(&b, "%s\n\n", retryStory(retry))
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
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
