//go:build linux

package main

import (
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// measureListen times Listen and Close together. An address with its host and one
// without go separate ways: the latter means one socket for both families, and
// whether that can be is a question to the kernel.
func measureListen(c config) (*Result, error) {
	r := &Result{Title: "1. Listen and Close"}
	for _, a := range []struct{ name, addr, title string }{
		{"literal", "127.0.0.1:0", `Listen on "127.0.0.1:0" and Close`},
		{"wildcard", ":0", `Listen on ":0" and Close`},
	} {
		t, err := listenAndClose(c, a.addr)
		if err != nil {
			return nil, err
		}
		t.Name, t.Title = a.name, a.title
		r.Tables = append(r.Tables, t)
		for _, g := range []struct {
			column string
			most   float64
		}{{"× net.Listen", 1.1}, {"× net, plain TCP", 1.3}} {
			s := t.cell(ours, g.column)
			r.Goals = append(r.Goals, Goal{
				Text:   fmt.Sprintf("%s: at most %v %s", a.addr, g.most, g.column),
				Figure: fmt.Sprintf("%s, by CPU time %s", s.format("×"), t.cell(ours, "CPU "+g.column).format("×")),
				Holds:  s.Median <= g.most,
			})
		}
	}
	r.Tables[1].Note = "tcplisten, go-reuseport and fasthttp listen on IPv4 alone here"
	return r, nil
}

func listenAndClose(c config, addr string) (Table, error) {
	n := pick(c, 3000, 10)
	wall, cpu := newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds)
	err := interleave(c, len(peers), func(round, i int) error {
		runtime.GC() // so that none pays for another's garbage
		start, startCPU := time.Now(), cpuTime()
		for range n {
			ln, err := peers[i].listen(addr)
			if err != nil {
				return fmt.Errorf("%s: %w", peers[i].name, err)
			}
			if err := ln.Close(); err != nil {
				return fmt.Errorf("%s: %w", peers[i].name, err)
			}
		}
		if round >= 0 {
			wall[i][round] = float64(time.Since(start)) / float64(n)
			cpu[i][round] = float64(cpuTime()-startCPU) / float64(n)
		}
		return nil
	})
	t := Table{Columns: []Column{{"time", "ns"}, {"CPU time", "ns"}, {"× net.Listen", "×"}, {"× net, plain TCP", "×"},
		{"CPU × net.Listen", "×"}, {"CPU × net, plain TCP", "×"}}}
	for i, p := range peers {
		t.Rows = append(t.Rows, Row{p.name, []*Summary{
			summarize(wall[i]), summarize(cpu[i]), summarize(ratios(wall[i], wall[0])), summarize(ratios(wall[i], wall[2])),
			summarize(ratios(cpu[i], cpu[0])), summarize(ratios(cpu[i], cpu[2])),
		}})
	}
	return t, err
}

// cpuTime is what this process has used, user and system. It tells less of the
// neighbours on a shared machine than a clock does.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(unix.TimevalToNsec(u.Utime) + unix.TimevalToNsec(u.Stime))
}
