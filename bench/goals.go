//go:build linux

package main

import (
	"fmt"
	"slices"
)

// A goal has a target for a measurement, the measured value and the verdict.
type goal struct {
	text, figure string
	verdict      verdict
}

// goals judges the results. The verdict for a missing result is unknown.
func goals() (all []goal) {
	// less adds the goal that a figure of row is at most factor times that of base.
	less := func(bench, row, unit string, factor float64, base, text string) {
		own, other := samples(bench, row, unit), samples(bench, base, unit)
		figure := cell(ratios(own, other), "×")
		if control := samples(bench, netAgain, unit); base == netDefault && control != nil {
			figure += fmt.Sprintf("; the control: %s, %s", cell(ratios(control, other), "×"), atMost(control, factor, other))
		}
		all = append(all, goal{text, figure, atMost(own, factor, other)})
	}
	// zero adds the goal that a figure of row is 0 in every round, and that of the
	// control is not.
	zero := func(bench, row, control, unit, text string) {
		v, c := samples(bench, row, unit), samples(bench, control, unit)
		all = append(all, goal{text, fmt.Sprintf("%s; the control (%s): %s", cell(v, unit), control, cell(c, unit)), never(v, c)})
	}
	for _, q := range []struct{ bench, addr string }{{"Listen/addr=literal", "127.0.0.1:0"}, {"Listen/addr=wildcard", ":0"}} {
		less(q.bench, ours, cpu, 1.1, netDefault, fmt.Sprintf("Listen on %q and Close: at most 1.1 × net.Listen's CPU time", q.addr))
		less(q.bench, ours, cpu, 1.3, netPlain, fmt.Sprintf("Listen on %q and Close: at most 1.3 × the CPU time of net's plain TCP", q.addr))
	}
	less("Accept", ours, cpu, 1.02, netDefault, "Accept: at most 1.02 × net.Listen's CPU time")
	less("HTTP", ours, cpu, 1.02, netDefault, "net/http: at most 1.02 × net.Listen's CPU time, clients included")

	const ns = "ns/op"
	few, some, many := readSizes[0], readSizes[1], readSizes[2]
	a, b := samples(readBench(many), readStats, ns), samples(readBench(few), readStats, ns)
	all = append(all, goal{fmt.Sprintf("Stats: with %d sockets at most 1.1 × the time with %d", many, few), cell(ratios(a, b), "×"), atMost(a, 1.1, b)})
	next := "none"
	for _, name := range readerNames[slices.Index(readerNames, readByHand)+1:] {
		if v := samples(readBench(some), name, ns); v != nil && (next == "none" || center(v) < center(samples(readBench(some), next, ns))) {
			next = name
		}
	}
	less(readBench(some), readStats, ns, 1.0/50, next, fmt.Sprintf("Stats: with %d sockets at most 1/50 of the time of the next best way (%s)", some, next))

	zero("Burst", manyQueues, oneQueue, "stalled", "Burst, 64 shards: no client stalls, in any round")
	late := samples("Burst", manyQueues, p99)
	all = append(all, goal{"Burst, 64 shards: p99 of the first byte at most 600 ms, 1.2 × the stall", cell(late, p99), atMost(late, 1, slices.Repeat([]float64{600e6}, len(late)))})

	// A control differs in one step: it has no overlap, no Drain or no steering.
	for _, r := range []struct {
		replicas int
		clients  string
		text     string
	}{{1, "busy", "One replica restarts, busy clients"}, {1, "calm", "One replica restarts, calm clients"}, {3, "busy", "Three replicas restart, busy clients"}} {
		bench := restartBench(r.replicas, r.clients)
		if r.replicas == 1 {
			zero(bench, restartShutdown, restartNet, "refused", r.text+", with overlap: no request is refused, in any round")
		}
		for _, own := range []struct{ row, name string }{{restartDrain, "Drain"}, {restartServe, "graceful.Serve"}} {
			zero(bench, own.row, restartShutdown, "lost", fmt.Sprintf("%s, %s: no request is lost, in any round", r.text, own.name))
			zero(bench, own.row, restartUnsteered, "stalled", fmt.Sprintf("%s, %s: no client stalls, in any round", r.text, own.name))
		}
	}
	for _, protocol := range []string{"http1", "h2-tls", "h2c"} {
		zero(keptBench(protocol), restartServe, restartShutdown, "lost", fmt.Sprintf("One replica restarts, kept-alive clients too, %s, graceful.Serve: no request is lost, in any round", protocol))
	}
	return all
}
