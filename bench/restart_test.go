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

	"github.com/acceptq/acceptq/bench/internal/netns"
)

const restartClients = 64 // at the same time

// BenchmarkRestart replaces a server once under load. Each client uses a new connection
// for every request. The two servers are separate processes whose programs use only one
// library.
func BenchmarkRestart(b *testing.B) {
	dir := build(b)
	for _, load := range []struct {
		name string
		rest time.Duration
	}{{"busy", 0}, {"calm", 20 * time.Millisecond}} {
		b.Run("clients="+load.name, func(b *testing.B) {
			shuffled(b, restarts, nameOf, func(b *testing.B, c candidate) {
				migrate := 0
				if c.name == restartMigrate {
					migrate = 1
				}
				if err := netns.SetSysctl("net.ipv4.tcp_migrate_req", migrate); err != nil {
					b.Fatal(err)
				}
				restart(b, filepath.Join(dir, c.program), c, load.rest)
			})
		})
	}
}

// restart restarts a server once, and counts the results of the requests.
func restart(b *testing.B, program string, c candidate, rest time.Duration) {
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
	var asked, refused, lost, stalled atomic.Int64
	replace(b, func() *exec.Cmd { return startWeb(b, socket, program, args) }, func(int) {
		e := ask(addr, 20*time.Second)
		asked.Add(1)
		switch {
		case errors.Is(e.err, syscall.ECONNREFUSED):
			refused.Add(1)
		case e.err != nil:
			lost.Add(1)
		case e.retried:
			stalled.Add(1)
		}
		if rest > 0 {
			time.Sleep(rest/2 + rand.N(rest)) // so that the clients do not run in step
		}
	})
	b.ReportMetric(float64(asked.Load()), "requests")
	b.ReportMetric(float64(lost.Load()), "lost")
	b.ReportMetric(float64(refused.Load()), "refused")
	b.ReportMetric(float64(stalled.Load()), "stalled")
}

// replace starts a server, and clients that call visit again and again. Then it starts a
// second server and stops the first. It returns when every client has ended.
func replace(b *testing.B, start func() *exec.Cmd, visit func(client int)) {
	old := start()
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
	next := start()
	b.ResetTimer()
	old.Process.Signal(syscall.SIGTERM)
	if err := old.Wait(); err != nil {
		b.Error(err)
	}
	b.StopTimer()
	time.Sleep(100 * time.Millisecond)
	close(stop)
	clients.Wait() // a stalled client takes a second or more
	next.Process.Kill()
	next.Wait()
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
