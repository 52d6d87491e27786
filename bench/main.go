//go:build linux

// Bench measures acceptq beside net.Listen and other libraries, all in one run,
// in turns, and writes what it found as text, JSON and pictures.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// config is what the flags say.
type config struct {
	rounds int
	short  bool
}

// pick is full, or small in a run that only shows that everything works.
func pick[T any](c config, full, small T) T {
	if c.short {
		return small
	}
	return full
}

// A measurement is one question. It is asked in a network namespace of its own,
// in a process of its own, so that none finds what another left behind.
type measurement struct {
	name string
	run  func(config) (*Result, error)
}

var measurements = []measurement{
	{"listen", measureListen},
	{"accept", measureAccept},
	{"queue", measureQueue},
	{"burst", measureBurst},
	{"restart", measureRestart},
	{"cost", measureCost},
}

func main() {
	if done, err := child(); done {
		exit(err)
	}
	exit(run())
}

// put adds a result, in the place of an earlier one, in the order of measurements.
func (r *Report) put(result *Result) {
	order := func(name string) int {
		return slices.IndexFunc(measurements, func(m measurement) bool { return m.name == name })
	}
	r.Results = slices.DeleteFunc(r.Results, func(old *Result) bool { return old.Name == result.Name })
	r.Results = append(r.Results, result)
	slices.SortFunc(r.Results, func(a, b *Result) int { return order(a.Name) - order(b.Name) })
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run() error {
	var names []string
	for _, m := range measurements {
		names = append(names, m.name)
	}
	rounds := flag.Int("rounds", 12, "how often each thing is measured")
	only := flag.String("only", strings.Join(names, ","), "which measurements, by name, with commas")
	out := flag.String("out", "results", "the directory for results.txt, results.json and the pictures")
	short := flag.Bool("short", false, "see that everything runs: a moment each, figures without worth")
	draw := flag.Bool("draw", false, "measure nothing: draw the pictures of results.json again")
	readme := flag.String("readme", "", "a file whose part between the marks is written anew from the results")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	c := config{rounds: *rounds, short: *short}
	if c.short {
		c.rounds = 1
	}
	if c.rounds < 1 {
		return errors.New("-rounds: at least 1")
	}
	if err := os.MkdirAll(*out, 0o777); err != nil {
		return err
	}
	file := filepath.Join(*out, "results.json")

	var report Report
	if *draw {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &report); err != nil {
			return err
		}
	} else {
		chosen := strings.Split(*only, ",")
		for _, name := range chosen {
			if !slices.Contains(names, name) {
				return fmt.Errorf("-only: no measurement %q; there are %s", name, strings.Join(names, ", "))
			}
		}
		report.Machine = thisMachine(c)
		// What is not measured now stays, if it was measured here.
		var former Report
		if text, err := os.ReadFile(file); err == nil && json.Unmarshal(text, &former) == nil && former.Machine == report.Machine {
			report.Results = former.Results
		}
		fmt.Println(report.Machine)
		for _, m := range measurements {
			if !slices.Contains(chosen, m.name) {
				continue
			}
			before := load()
			r, err := inNamespace(m, c)
			if err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			r.Rounds, r.Load = c.rounds, before+" before and "+load()+" after"
			report.put(r)
			fmt.Print(r)
		}
		text, err := json.MarshalIndent(report, "", "\t")
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, append(text, '\n'), 0o666); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(*out, "results.txt"), []byte(report.String()), 0o666); err != nil {
			return err
		}
	}
	if err := drawAll(&report, *out); err != nil {
		return err
	}
	if *readme != "" {
		return writeReadme(*readme, &report)
	}
	return nil
}
