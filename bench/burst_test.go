//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/bench/internal/isolate"
	"golang.org/x/sys/unix"
)

const (
	burstStall    = 500 * time.Millisecond
	burstPatience = time.Minute // a client without an answer after this time is lost
)

// BenchmarkBurst connects many clients at once to a server that is stopped for a while.
// The server is a separate process whose program uses only one library.
func BenchmarkBurst(b *testing.B) {
	clients := 5000
	if testing.Short() {
		clients = 200
	}
	dir := build(b)
	shuffled(b, bursts, nameOf, func(b *testing.B, c candidate) {
		ceiling := 128
		if c.name == longQueue {
			ceiling = clients
		}
		if err := isolate.SetSysctl("net.core.somaxconn", ceiling); err != nil {
			b.Fatal(err)
		}
		server, addr, err := startServer(filepath.Join(dir, c.program), c.arg)
		if err != nil {
			b.Fatal(err)
		}
		before, err1 := acceptq.ReadSystem()
		visits, err := burst(server.Process, addr, clients)
		after, err2 := acceptq.ReadSystem()
		server.Process.Kill()
		server.Wait()
		if err := errors.Join(err, err1, err2); err != nil {
			b.Fatal(err)
		}
		var atOnce, stalled, lost float64
		first := make([]float64, len(visits))
		for k, v := range visits {
			switch {
			case v.first == 0:
				lost++
				v.first = burstPatience
			case v.retried:
				stalled++
			default:
				atOnce++
			}
			first[k] = float64(v.first)
		}
		slices.Sort(first)
		b.ReportMetric(atOnce, "at-once")
		b.ReportMetric(stalled, "stalled")
		b.ReportMetric(lost, "lost")
		b.ReportMetric(float64(after.ListenDrops-before.ListenDrops), "dropped")
		b.ReportMetric(first[len(first)/2], "p50-ns")
		b.ReportMetric(first[len(first)*99/100], p99)
		b.ReportMetric(float64(server.ProcessState.UserTime()+server.ProcessState.SystemTime()), "server-cpu-ns")
	})
}

// startServer starts an echo server and waits until it answers.
func startServer(program string, arg string) (*exec.Cmd, *net.TCPAddr, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0") // finds a free port
	if err != nil {
		return nil, nil, err
	}
	addr := ln.Addr().(*net.TCPAddr)
	ln.Close()
	cmd := exec.Command(program, addr.String(), arg)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("tcp4", addr.String())
		if err == nil {
			var p [1]byte
			c.SetDeadline(end)
			c.Write([]byte{'?'})
			_, err = io.ReadFull(c, p[:])
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		if err == nil {
			return cmd, addr, nil
		}
		if time.Now().After(end) {
			cmd.Process.Kill()
			cmd.Wait()
			return nil, nil, fmt.Errorf("the server does not answer: %w", err)
		}
	}
}

// A visit is the result of one client of a burst.
type visit struct {
	fd      int
	start   time.Time
	first   time.Duration // until the first byte of the answer; 0 without an answer
	asked   bool
	retried bool // a packet was retransmitted
}

// burst stops the server, lets n clients connect at once, and continues the server
// after the stall. It returns when all clients have their answer. One thread runs all
// clients, so that the server has the other cores.
func burst(server *os.Process, addr *net.TCPAddr, n int) ([]visit, error) {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(poll)
	if err := stop(server); err != nil {
		return nil, err
	}
	visits := make([]visit, n)
	defer func() {
		for _, v := range visits { // close them here, because closing is not part of the burst
			if v.fd > 0 {
				rawClient(v.fd).close()
			}
		}
	}()
	for k := range visits {
		v := &visits[k]
		if v.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return nil, err
		}
		v.start = time.Now()
		if err := unix.Connect(v.fd, loopback(addr)); err != nil && err != unix.EINPROGRESS {
			return nil, err
		}
		if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, v.fd, &unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(k)}); err != nil {
			return nil, err
		}
	}
	// On a slow machine the stall ends when the last client has connected.
	time.AfterFunc(burstStall-time.Since(visits[0].start), func() { server.Signal(syscall.SIGCONT) })
	events := make([]unix.EpollEvent, 256)
	for waiting, end := n, time.Now().Add(burstPatience); waiting > 0 && time.Now().Before(end); {
		m, err := unix.EpollWait(poll, events, 100)
		if err != nil && err != unix.EINTR {
			return nil, err
		}
		for _, e := range events[:max(m, 0)] {
			if visits[e.Fd].step(poll, e.Fd) {
				waiting--
			}
		}
	}
	for k := range visits {
		visits[k].retried = retried(visits[k].fd)
	}
	return visits, nil
}

// stop stops a process and waits until it has stopped.
func stop(p *os.Process) error {
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(p.Pid, &status, unix.WUNTRACED, nil)
		switch {
		case err == nil && status.Stopped():
			return nil
		case err == nil:
			return fmt.Errorf("the server ended: %v", status)
		case err != unix.EINTR:
			return err
		}
	}
}

// step continues as far as it can without blocking: once the client is connected, it
// sends the request and then reads. It reports whether the client has finished.
func (v *visit) step(poll int, index int32) (done bool) {
	if !v.asked {
		if _, err := unix.Write(v.fd, []byte{'?'}); err == nil {
			v.asked = true
			return unix.EpollCtl(poll, unix.EPOLL_CTL_MOD, v.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: index}) != nil
		}
	} else {
		var p [1]byte
		if n, err := unix.Read(v.fd, p[:]); n == 1 && err == nil {
			v.first = time.Since(v.start)
		}
	}
	unix.EpollCtl(poll, unix.EPOLL_CTL_DEL, v.fd, nil)
	return true
}
