//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
)

// measureAccept times the taking of connections, by Accept alone and by net/http,
// and counts the system calls of each.
func measureAccept(c config) (*Result, error) {
	r := &Result{Title: "2. Accept"}
	direct, err := accepting(c)
	if err != nil {
		return nil, err
	}
	web, err := serving(c)
	if err != nil {
		return nil, err
	}
	r.Tables = append(r.Tables, direct, web)
	for _, t := range []Table{direct, web} {
		own, noise := t.cell(ours, "rate × net.Listen's"), t.cell(netAgain, "rate × net.Listen's")
		ownCPU, noiseCPU := t.cell(ours, "CPU × net.Listen"), t.cell(netAgain, "CPU × net.Listen")
		r.Goals = append(r.Goals, Goal{
			Text:   t.Title + ": at least 0.98 × net.Listen's rate",
			Figure: fmt.Sprintf("%s, the control %s; CPU time × net.Listen's %s, the control %s", own.format("×"), noise.format("×"), ownCPU.format("×"), noiseCPU.format("×")),
			Holds:  own.Median >= 0.98,
		})
	}
	for _, job := range []struct{ name, title string }{
		{"accept", "System calls per connection: Accept, Close"},
		{"http", "System calls per connection: net/http, one request"},
	} {
		t, err := syscalls(c, job.name)
		if err != nil {
			return nil, err
		}
		t.Name, t.Title = "syscalls-"+job.name, job.title
		r.Tables = append(r.Tables, t)
	}
	return r, nil
}

// accepting fills the queue, and times how long it takes to empty it.
func accepting(c config) (Table, error) {
	n := pick(c, 1500, 20)
	wall, cpu := newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds)
	conns := make([]net.Conn, n)
	err := interleave(c, len(peers), func(round, i int) error {
		ln, err := peers[i].listen("127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("%s: %w", peers[i].name, err)
		}
		defer ln.Close()
		clients, err := fill(ln, n)
		defer func() {
			for _, c := range clients {
				c.close()
			}
		}()
		if err != nil {
			return fmt.Errorf("%s: %w", peers[i].name, err)
		}
		runtime.GC() // so that none pays for another's garbage
		start, startCPU := time.Now(), cpuTime()
		for k := range conns {
			if conns[k], err = ln.Accept(); err != nil {
				return fmt.Errorf("%s: %w", peers[i].name, err)
			}
		}
		if round >= 0 {
			wall[i][round] = float64(time.Since(start)) / float64(n)
			cpu[i][round] = float64(cpuTime()-startCPU) / float64(n)
		}
		for _, c := range conns {
			c.Close()
		}
		return nil
	})
	return rateTable("accept", "Accept, with clients waiting", wall, cpu), err
}

var (
	httpRequest = []byte("GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
	httpAnswer  = []byte("answered")
)

func httpHandler(w http.ResponseWriter, _ *http.Request) { w.Write(httpAnswer) }

// serving times net/http over each listener, with a connection for each request.
func serving(c config) (Table, error) {
	n := pick(c, 4000, 20)
	const atOnce = 8
	wall, cpu := newSamples(len(peers), c.rounds), newSamples(len(peers), c.rounds)
	err := interleave(c, len(peers), func(round, i int) error {
		ln, err := peers[i].listen("127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("%s: %w", peers[i].name, err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(httpHandler)}
		served := make(chan struct{})
		go func() { defer close(served); srv.Serve(ln) }()
		defer func() { srv.Close(); <-served }()
		runtime.GC()
		start, startCPU := time.Now(), cpuTime()
		failed := make(chan error, atOnce)
		var clients sync.WaitGroup
		for range atOnce {
			clients.Go(func() {
				for range n / atOnce {
					if e := ask(ln.Addr(), 20*time.Second, httpRequest, httpAnswer); e.err != nil {
						failed <- e.err
						return
					}
				}
			})
		}
		clients.Wait()
		if round >= 0 {
			wall[i][round] = float64(time.Since(start)) / float64(n)
			cpu[i][round] = float64(cpuTime()-startCPU) / float64(n)
		}
		select {
		case err := <-failed:
			return fmt.Errorf("%s: %w", peers[i].name, err)
		default:
			return nil
		}
	})
	t := rateTable("http", "net/http, one request for each connection", wall, cpu)
	t.Note = "clients are of the same process, and in these times"
	return t, err
}

func rateTable(name, title string, wall, cpu [][]float64) Table {
	t := Table{Name: name, Title: title, Columns: []Column{
		{"time", "ns"}, {"CPU time", "ns"}, {"× net.Listen", "×"}, {"× net, plain TCP", "×"}, {"CPU × net.Listen", "×"}, {"rate × net.Listen's", "×"},
	}}
	for i, p := range peers {
		t.Rows = append(t.Rows, Row{p.name, []*Summary{
			summarize(wall[i]), summarize(cpu[i]),
			summarize(ratios(wall[i], wall[0])), summarize(ratios(wall[i], wall[2])), summarize(ratios(cpu[i], cpu[0])), summarize(ratios(wall[0], wall[i])),
		}})
	}
	return t
}

// socketCalls is what is done with a connection, and not by the Go scheduler.
var socketCalls = []string{"accept4", "getsockname", "getsockopt", "setsockopt", "fcntl", "epoll_ctl", "read", "write", "shutdown", "close"}

// syscalls counts those of a process that takes connections. It is run twice, with
// more connections the second time, and what the two differ in is due to these.
func syscalls(c config, job string) (Table, error) {
	var t Table
	if _, err := exec.LookPath("strace"); err != nil {
		t.Note = "unknown: there is no strace here"
		return t, nil
	}
	few, many := pick(c, 200, 5), pick(c, 1200, 15)
	for _, name := range socketCalls {
		t.Columns = append(t.Columns, Column{Name: name})
	}
	t.Columns = append(t.Columns, Column{Name: "sum"}, Column{Name: "others"})
	for i, p := range peers {
		before, err := traced(job, i, few)
		if err != nil {
			return t, fmt.Errorf("%s: %w", p.name, err)
		}
		after, err := traced(job, i, many)
		if err != nil {
			return t, fmt.Errorf("%s: %w", p.name, err)
		}
		per := func(name string) float64 { return (after[name] - before[name]) / float64(many-few) }
		row := Row{Label: p.name}
		var sum, all float64
		for _, name := range socketCalls {
			row.Cells = append(row.Cells, summarize([]float64{per(name)}))
			sum += per(name)
		}
		for name := range after {
			all += per(name)
		}
		row.Cells = append(row.Cells, summarize([]float64{sum}), summarize([]float64{all - sum}))
		t.Rows = append(t.Rows, row)
	}
	t.Note = "strace -f -c, one run; others: futex, nanosleep and the like, the Go scheduler's, which vary"
	return t, nil
}

// traced counts the system calls of a process that takes n connections.
func traced(job string, peer, n int) (map[string]float64, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "counts")
	cmd := exec.Command("strace", "-f", "-c", "-o", file, self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", tracedEnv, job, peer, n))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	err = func() error {
		defer stdin.Close()
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			return err
		}
		port, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			return err
		}
		addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}
		if job == "http" {
			for range n {
				if e := ask(addr, 20*time.Second, httpRequest, httpAnswer); e.err != nil {
					return e.err
				}
			}
			return nil
		}
		for range n {
			c, err := connectRaw(addr)
			if err != nil {
				return err
			}
			defer c.close()
		}
		stdin.Write([]byte{'\n'}) // all are in the queue
		_, err = io.Copy(io.Discard, stdout)
		return err
	}()
	if werr := cmd.Wait(); err == nil {
		err = werr
	}
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	counts := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		// % time, seconds, usecs/call, calls, errors where there are any, name
		f := strings.Fields(line)
		if len(f) < 5 || f[len(f)-1] == "total" {
			continue
		}
		if n, err := strconv.ParseFloat(f[3], 64); err == nil {
			counts[f[len(f)-1]] = n
		}
	}
	if len(counts) == 0 {
		return nil, fmt.Errorf("strace counted nothing:\n%s", text)
	}
	return counts, nil
}

// serveTraced is the process whose calls are counted.
func serveTraced(job string) error {
	var what string
	var peer, n int
	if _, err := fmt.Sscan(job, &what, &peer, &n); err != nil {
		return err
	}
	ln, err := peers[peer].listen("127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr().(*net.TCPAddr).Port)
	wait := bufio.NewReader(os.Stdin)
	if what == "http" {
		go http.Serve(ln, http.HandlerFunc(httpHandler))
		wait.ReadByte() // until it is closed
		return nil
	}
	if _, err := wait.ReadByte(); err != nil {
		return err
	}
	for range n {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		c.Close()
	}
	return nil
}
