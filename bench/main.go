//go:build linux

// Bench runs the benchmarks of this directory in a random order, and makes tables
// and pictures of what they print.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var names []string
	for _, m := range measurements {
		names = append(names, m.name)
	}
	rounds := flag.Int("rounds", 0, "run each measurement in `n` rounds; 0 means its own default")
	only := flag.String("only", strings.Join(names, ","), "run these measurements only; separate the `names` by commas")
	out := flag.String("out", "", "write to this `directory` instead of results/ and README.md")
	short := flag.Bool("short", false, "run everything for a short time, to check that it works; without -out, write nothing")
	draw := flag.Bool("draw", false, "measure nothing; write the tables and pictures of earlier results again")
	check := flag.Bool("check", false, "exit with status 1 if a goal is missed")
	flag.Parse()
	chosen := strings.Split(*only, ",")
	for _, name := range chosen {
		if !slices.Contains(names, name) {
			return fmt.Errorf("-only: no measurement %q; there are %s", name, strings.Join(names, ", "))
		}
	}
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case *rounds < 0:
		return fmt.Errorf("-rounds %d: must not be negative", *rounds)
	}
	if _, err := os.Stat("internal/alone"); err != nil {
		return errors.New("run this in the directory bench, or as: go run -C bench")
	}
	work, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	dir := "results"
	switch {
	case *out != "":
		dir = *out
	case *short && !*draw:
		dir = work
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	if !*draw {
		binary := filepath.Join(work, "bench.test")
		if out, err := exec.Command("go", "test", "-c", "-o", binary, ".").CombinedOutput(); err != nil {
			return fmt.Errorf("go test -c: %w\n%s", err, out)
		}
		for _, m := range measurements {
			if !slices.Contains(chosen, m.name) {
				continue
			}
			if err := m.measure(binary, m.file(dir), *rounds, *short); err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
		}
	}
	for _, m := range measurements {
		if err := m.read(m.file(dir)); err != nil {
			return err
		}
	}
	goals := goals()
	if *out == "" && dir == "results" {
		err = errors.Join(writeReadme(goals), darkenQueues())
	} else {
		_, err = io.WriteString(os.Stdout, text(goals))
	}
	if err == nil {
		err = drawAll(dir)
	}
	if err == nil && *check && slices.ContainsFunc(goals, func(g goal) bool { return g.verdict == fallsShort }) {
		err = errors.New("a goal is missed")
	}
	return err
}

func (m *measurement) file(dir string) string { return filepath.Join(dir, m.name+".txt") }

// measure runs the benchmarks and stores their output. The lines before the first round
// describe the measurement in Go's benchmark format.
func (m *measurement) measure(binary, file string, rounds int, short bool) error {
	args := []string{"-test.run=^$", "-test.bench=^Benchmark(" + m.bench + ")$", "-test.benchtime=" + m.benchtime}
	text := describe()
	if rounds == 0 && !short {
		rounds = m.rounds
	}
	if short {
		rounds = max(rounds, 1)
		args = append(args, "-test.benchtime=1x", "-test.short")
		text += "short: the figures are worth nothing\n"
	}
	start := time.Now()
	for range rounds {
		text += "load: " + load() + "\n"
		out, err := exec.Command(binary, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		text += string(out)
	}
	fmt.Fprintf(os.Stderr, "%s: %d rounds in %v\n", m.name, rounds, time.Since(start).Round(time.Second))
	return os.WriteFile(file, []byte(text), 0o666)
}
