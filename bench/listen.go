//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	wildcardAddr = ":0"
	handMade     = "socket, bind, listen, FileListener by hand"
)

// measureListen times Listen and Close together. An address with its host and one
// without go separate ways: the latter means one socket for both families, and
// whether that can be is a question to the kernel.
func measureListen(c config) (*Result, error) {
	r := &Result{Title: "1. Listen and Close"}
	for _, a := range []struct{ name, addr, title string }{
		{"literal", "127.0.0.1:0", `Listen on "127.0.0.1:0" and Close`},
		{"wildcard", wildcardAddr, `Listen on ":0" and Close`},
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
				Text: fmt.Sprintf("%s: at most %v %s", a.addr, g.most, g.column),
				Figure: fmt.Sprintf("%s, by CPU time %s; by hand %s and %s", s.format("×"), t.cell(ours, "CPU "+g.column).format("×"),
					t.cell(handMade, g.column).format("×"), t.cell(handMade, "CPU "+g.column).format("×")),
				Holds: s.Median <= g.most,
			})
		}
	}
	r.Tables[1].Note = "tcplisten, go-reuseport and fasthttp listen on IPv4 alone here"
	return r, nil
}

// byHand is no library: the calls that every one makes which builds its socket
// itself and gives it to net, and nothing else. What it takes more than net's plain
// form is the price of net.FileListener, which copies the descriptor and looks at it.
func byHand(addr string) (net.Listener, error) {
	domain, sa := unix.AF_INET, unix.Sockaddr(loopback(0))
	if addr == wildcardAddr {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "by hand")
	defer file.Close()
	if domain == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return nil, err
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return nil, err
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, err
	}
	return net.FileListener(file)
}

func listenAndClose(c config, addr string) (Table, error) {
	// A turn is short, and a round has many: what disturbs the machine for longer
	// than that disturbs all of them, and garbage is paid for by who makes it.
	const turn = 50
	turns := pick(c, 60, 1)
	peers := append(slices.Clone(peers), peer{handMade, byHand})
	wall, cpu := newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds)
	err := interleave(c, turns, func(round, t int) error {
		for k := range peers {
			i := (t + k) % len(peers)
			start, startCPU := time.Now(), cpuTime()
			for range turn {
				ln, err := peers[i].listen(addr)
				if err != nil {
					return fmt.Errorf("%s: %w", peers[i].name, err)
				}
				if err := ln.Close(); err != nil {
					return fmt.Errorf("%s: %w", peers[i].name, err)
				}
			}
			if round >= 0 {
				wall[i][round] += float64(time.Since(start)) / float64(turn*turns)
				cpu[i][round] += float64(cpuTime()-startCPU) / float64(turn*turns)
			}
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
