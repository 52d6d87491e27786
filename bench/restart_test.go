//go:build linux

package main

import (
	"bufio"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq/bench/internal/isolate"
)

const restartClients = 64 // at the same time

// BenchmarkRestart replaces every replica of a server once under load. Each client uses a
// new connection for every request. Each server is a process of its own, whose program
// uses only one library.
func BenchmarkRestart(b *testing.B) {
	dir := build(b)
	for _, load := range []struct {
		name     string
		ways     []candidate
		replicas int
		rest     time.Duration
	}{
		{"replicas=1/clients=busy", restarts, 1, 0},
		{"replicas=1/clients=calm", restarts, 1, 20 * time.Millisecond},
		{"replicas=3/clients=busy", restartsBeside, 3, 0},
	} {
		b.Run(load.name, func(b *testing.B) {
			shuffled(b, load.ways, nameOf, func(b *testing.B, c candidate) {
				migrate := 0
				if c.name == restartMigrate {
					migrate = 1
				}
				if err := isolate.SetSysctl("net.ipv4.tcp_migrate_req", migrate); err != nil {
					b.Fatal(err)
				}
				restart(b, filepath.Join(dir, c.program), c, load.replicas, load.rest)
			})
		})
	}
}

// restart restarts every replica once, and counts the results of the requests.
func restart(b *testing.B, program string, c candidate, replicas int, rest time.Duration) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr := ln.Addr()
	args, socket := []string{addr.String(), c.arg}, (*os.File)(nil)
	if c.inherits {
		args[0] = "inherited"
		if socket, err = ln.(*net.TCPListener).File(); err != nil {
			b.Fatal(err)
		}
		defer socket.Close()
	}
	ln.Close()
	var t tally
	replace(b, replicas, func() *exec.Cmd { return startWeb(b, socket, program, args) }, func(int) {
		t.add(ask(addr, 20*time.Second))
		if rest > 0 {
			time.Sleep(rest/2 + rand.N(rest)) // so that the clients do not run in step
		}
	})
	t.report(b)
}

// A tally counts the results of requests. Each request counts once at most: a request
// that is refused is not lost as well.
type tally struct{ asked, lost, refused, stalled atomic.Int64 }

func (t *tally) add(e exchange) {
	t.asked.Add(1)
	switch {
	case errors.Is(e.err, syscall.ECONNREFUSED):
		t.refused.Add(1)
	case e.err != nil:
		t.lost.Add(1)
	case e.retried:
		t.stalled.Add(1)
	}
}

func (t *tally) report(b *testing.B) {
	b.ReportMetric(float64(t.asked.Load()), "requests")
	b.ReportMetric(float64(t.lost.Load()), "lost")
	b.ReportMetric(float64(t.refused.Load()), "refused")
	b.ReportMetric(float64(t.stalled.Load()), "stalled")
}

// replace starts some servers, and clients that call visit again and again. Then it
// replaces one server after the other: it starts the next one and stops the old one. It
// returns when every client has ended. It reports how long a server needs to stop.
func replace(b *testing.B, replicas int, start func() *exec.Cmd, visit func(client int)) {
	var old []*exec.Cmd
	for range replicas {
		old = append(old, start())
	}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range restartClients {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					visit(i)
				}
			}
		})
	}
	if !testing.Short() {
		time.Sleep(200 * time.Millisecond)
	}
	var stopping time.Duration
	var next []*exec.Cmd
	for _, server := range old {
		next = append(next, start())
		began := time.Now()
		server.Process.Signal(syscall.SIGTERM)
		if err := server.Wait(); err != nil {
			b.Error(err)
		}
		stopping += time.Since(began)
	}
	time.Sleep(100 * time.Millisecond)
	close(stop)
	clients.Wait() // a stalled client takes a second or more
	for _, server := range next {
		server.Process.Kill()
		server.Wait()
	}
	b.ReportMetric(float64(stopping)/float64(replicas), "ns/op")
}

// startWeb starts a web server. It returns when the server serves or waits for the port.
func startWeb(b *testing.B, socket *os.File, program string, args []string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if socket != nil {
		cmd.ExtraFiles = []*os.File{socket}
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = bufio.NewReader(out).ReadString('\n')
	}
	if err != nil {
		b.Fatal(program, args, err)
	}
	return cmd
}
