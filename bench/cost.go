//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// measureCost weighs a listener, and a program that has one.
func measureCost(c config) (*Result, error) {
	memory, err := listenerMemory(c)
	if err != nil {
		return nil, err
	}
	programs, err := programSizes()
	if err != nil {
		return nil, err
	}
	return &Result{Title: "6. Memory, programs, dependencies", Tables: []Table{memory, programs}}, nil
}

// listenerMemory counts what listening allocates, and what is kept of it while the
// listener is open.
func listenerMemory(c config) (Table, error) {
	n := pick(c, 1000, 20)
	bytes, allocs, kept := newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds)
	listeners := make([]net.Listener, n)
	err := interleave(c, len(peers), func(round, i int) (err error) {
		var before, during, after runtime.MemStats
		settle()
		runtime.ReadMemStats(&before)
		for k := range listeners {
			if listeners[k], err = peers[i].listen("127.0.0.1:0"); err != nil {
				return fmt.Errorf("%s: %w", peers[i].name, err)
			}
		}
		runtime.ReadMemStats(&during)
		settle()
		runtime.ReadMemStats(&after)
		for k := range listeners {
			listeners[k].Close()
			listeners[k] = nil
		}
		if round >= 0 {
			bytes[i][round] = float64(during.TotalAlloc-before.TotalAlloc) / float64(n)
			allocs[i][round] = float64(during.Mallocs-before.Mallocs) / float64(n)
			kept[i][round] = (float64(after.HeapAlloc) - float64(before.HeapAlloc)) / float64(n)
		}
		return nil
	})
	t := Table{
		Name:    "memory",
		Title:   "Go's heap, for each listener",
		Columns: []Column{{"allocated", "B"}, {"allocations", ""}, {"kept while open", "B"}},
		Note:    "the kernel's part is not counted",
	}
	for i, p := range peers {
		t.Rows = append(t.Rows, Row{p.name, []*Summary{summarize(bytes[i]), summarize(allocs[i]), summarize(kept[i])}})
	}
	return t, err
}

// settle collects what nobody holds; finalizers and pools need a second time.
func settle() {
	runtime.GC()
	runtime.GC()
}

// programSizes builds the smallest programs, without symbols, and counts the
// modules in them.
func programSizes() (Table, error) {
	t := Table{
		Name:    "programs",
		Title:   "The smallest program that serves, built without symbols",
		Columns: []Column{{"bytes", "B"}, {"more than net", "B"}, {"modules besides", ""}, {"packages besides Go's", ""}},
		Note:    "modules and packages besides Go's own and the program's",
	}
	if _, err := exec.LookPath("go"); err != nil {
		t.Note = "unknown: there is no go command here"
		return t, nil
	}
	if _, err := os.Stat("internal/size"); err != nil {
		t.Note = "unknown: this was not run in the directory bench"
		return t, nil
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return t, err
	}
	defer os.RemoveAll(dir)
	sizes := map[string]float64{}
	for _, p := range []struct{ label, dir, than string }{
		{"net", "net", "net"},
		{"acceptq", "acceptq", "net"},
		{"valyala/tcplisten", "tcplisten", "net"},
		{"libp2p/go-reuseport", "libp2p", "net"},
		{"fasthttp/reuseport", "fasthttp", "net"},
		{"net with net/http", "nethttp", "nethttp"},
		{"acceptq with net/http", "acceptqhttp", "nethttp"},
	} {
		bin, pkg := filepath.Join(dir, p.dir), "./internal/size/"+p.dir
		if out, err := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, pkg).CombinedOutput(); err != nil {
			return t, fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
		}
		info, err := os.Stat(bin)
		if err != nil {
			return t, err
		}
		sizes[p.dir] = float64(info.Size())
		out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.Module.Path}}{{end}}", pkg).Output()
		if err != nil {
			return t, fmt.Errorf("go list %s: %w", pkg, err)
		}
		modules, packages := map[string]bool{}, 0.0
		for _, m := range strings.Fields(string(out)) {
			if m != "github.com/acceptq/acceptq/bench" {
				modules[m] = true
				packages++
			}
		}
		t.Rows = append(t.Rows, Row{p.label, []*Summary{
			summarize([]float64{sizes[p.dir]}), summarize([]float64{sizes[p.dir] - sizes[p.than]}),
			summarize([]float64{float64(len(modules))}), summarize([]float64{packages}),
		}})
	}
	return t, nil
}
