//go:build linux

package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/acceptq/acceptq"
	libp2p "github.com/libp2p/go-reuseport"
	"golang.org/x/sys/unix"
)

const (
	burstStall   = 500 * time.Millisecond
	burstTimeout = 3 * time.Second
	burstCeiling = 128
)

// A crew is one way to have one or more listeners on one port.
type crew struct {
	name    string
	ceiling int // net.core.somaxconn
	listen  func() ([]net.Listener, error)
}

func shards(n, ceiling int) crew {
	name := fmt.Sprintf("acceptq, %d shards", n)
	if n == 1 {
		name = "acceptq, 1 shard"
	}
	if ceiling != burstCeiling {
		name += ", ceiling raised"
	}
	return crew{name, ceiling, func() ([]net.Listener, error) {
		s, err := acceptq.ListenTCPShards("127.0.0.1:0", n)
		if err != nil {
			return nil, err
		}
		var all []net.Listener
		for l := range s.All() {
			all = append(all, l)
		}
		return all, nil
	}}
}

// measureBurst sends all clients at once to a server that does not accept for a
// while, where no queue may be longer than 128.
func measureBurst(c config) (*Result, error) {
	// net reads it once in the life of a process, and that must be this one.
	if err := setSysctl("net.core.somaxconn", fmt.Sprint(burstCeiling)); err != nil {
		return nil, err
	}
	ln, err := listenNet("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ln.Close()
	var crews []crew
	for _, p := range peers {
		if p.name == ours {
			continue // it is the one shard
		}
		crews = append(crews, crew{p.name, burstCeiling, func() ([]net.Listener, error) {
			ln, err := p.listen("127.0.0.1:0")
			return []net.Listener{ln}, err
		}})
	}
	const byHand = 64
	crews = append(crews, crew{fmt.Sprintf("libp2p/go-reuseport, %d by hand", byHand), burstCeiling, func() (all []net.Listener, err error) {
		for addr := "127.0.0.1:0"; len(all) < byHand; addr = all[0].Addr().String() {
			ln, err := libp2p.Listen("tcp4", addr)
			if err != nil {
				return all, err
			}
			all = append(all, ln)
		}
		return all, nil
	}})
	clients := pick(c, 5000, 200)
	for _, n := range []int{1, 4, 16, 64} {
		crews = append(crews, shards(n, burstCeiling))
	}
	// With room for all, what is left is the work of the machine.
	crews = append(crews, shards(1, clients))

	answered, dropped, lost := newSamples(len(crews), c.rounds), newSamples(len(crews), c.rounds), newSamples(len(crews), c.rounds)
	kernel := newSamples(len(crews), c.rounds)
	p50, p99 := newSamples(len(crews), c.rounds), newSamples(len(crews), c.rounds)
	err = interleave(c, len(crews), func(round, i int) error {
		if err := setSysctl("net.core.somaxconn", fmt.Sprint(crews[i].ceiling)); err != nil {
			return err
		}
		all, err := crews[i].listen()
		defer func() {
			for _, ln := range all {
				ln.Close()
			}
		}()
		if err != nil {
			return fmt.Errorf("%s: %w", crews[i].name, err)
		}
		before, _ := acceptq.ReadSystem()
		done, err := burst(all, clients)
		if err != nil {
			return fmt.Errorf("%s: %w", crews[i].name, err)
		}
		after, _ := acceptq.ReadSystem()
		if round < 0 {
			return nil
		}
		first := make([]float64, len(done))
		for k, e := range done {
			switch {
			case e.err != nil:
				lost[i][round]++
				e.first = burstTimeout
			case e.retried:
				dropped[i][round]++
			default:
				answered[i][round]++
			}
			first[k] = float64(e.first)
		}
		slices.Sort(first)
		p50[i][round], p99[i][round] = quantile(first, 0.5), quantile(first, 0.99)
		kernel[i][round] = float64(after.ListenDrops - before.ListenDrops)
		return nil
	})
	if err != nil {
		return nil, err
	}
	t := Table{
		Name:  "burst",
		Title: fmt.Sprintf("%d clients at once, the server stalls for %v, net.core.somaxconn is %d", clients, burstStall, burstCeiling),
		Columns: []Column{{"at once", ""}, {"dropped, came again", ""}, {"lost", ""}, {"packets dropped", ""},
			{"first byte, p50", "ns"}, {"first byte, p99", "ns"}},
		Note: fmt.Sprintf("at once: answered, and no packet sent twice; lost: no answer in %v, which then counts as the time; the raised ceiling is %d", burstTimeout, clients),
	}
	for i, cr := range crews {
		t.Rows = append(t.Rows, Row{cr.name, []*Summary{
			summarize(answered[i]), summarize(dropped[i]), summarize(lost[i]), summarize(kernel[i]), summarize(p50[i]), summarize(p99[i]),
		}})
	}
	r := &Result{Title: "4. Burst", Tables: []Table{t}}
	most := len(crews) - 2
	best, roomy := crews[most].name, crews[most+1].name
	again, gone, drops := t.cell(best, "dropped, came again"), t.cell(best, "lost"), t.cell(best, "packets dropped")
	r.Goals = append(r.Goals, Goal{
		Text:   best + ": 0 dropped",
		Figure: fmt.Sprintf("%s dropped, %s lost, %s packets", again.format(""), gone.format(""), drops.format("")),
		Holds:  slices.Max(dropped[most]) == 0 && slices.Max(lost[most]) == 0, // in the worst round too
	}, Goal{
		Text:   fmt.Sprintf("%s: p99 within %v, 1.2 × the stall", best, burstStall*12/10),
		Figure: fmt.Sprintf("%s; %s: %s", t.cell(best, "first byte, p99").format("ns"), roomy, t.cell(roomy, "first byte, p99").format("ns")),
		Holds:  t.cell(best, "first byte, p99").Median <= float64(burstStall*12/10),
	})
	return r, nil
}

// A visit is what became of one client of a burst.
type visit struct {
	fd      int
	start   time.Time
	first   time.Duration // from its first step to the first byte of the answer
	asked   bool
	done    bool
	err     error
	retried bool // a packet of its had to be sent again
}

// burst has n clients come at once, and the listeners begin to accept after the
// stall. It returns when each client is answered or has given up. The clients are
// one thread's work, without goroutines: they share the cores with the server,
// whose work is measured.
func burst(listeners []net.Listener, n int) ([]visit, error) {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(poll)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	time.AfterFunc(burstStall, func() {
		for _, ln := range listeners {
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go answer(c)
				}
			}()
		}
	})

	visits := make([]visit, 0, n)
	defer func() {
		for k := range visits { // not meanwhile: it is no part of the burst
			visits[k].finish()
		}
	}()
	sa := loopback(listeners[0].Addr().(*net.TCPAddr).Port)
	for k := range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		visits = append(visits, visit{fd: fd, start: time.Now()})
		if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
			return nil, err
		}
		if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(k)}); err != nil {
			return nil, err
		}
	}
	events := make([]unix.EpollEvent, 256)
	for waiting := n; waiting > 0; {
		left := burstTimeout - time.Since(visits[n-1].start)
		if left <= 0 {
			break
		}
		m, err := unix.EpollWait(poll, events, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return nil, err
		}
		for _, e := range events[:max(m, 0)] {
			if visits[e.Fd].step(poll, e.Fd); visits[e.Fd].done {
				waiting--
			}
		}
	}
	for k := range visits {
		if v := &visits[k]; v.err == nil && (!v.done || v.first > burstTimeout) {
			v.err = os.ErrDeadlineExceeded
		}
	}
	return visits, nil
}

// step goes on as far as it can: ask once the connection is there, then read.
func (v *visit) step(poll int, index int32) {
	if !v.asked {
		if _, v.err = unix.Write(v.fd, askByte); v.err == nil {
			v.asked = true
			v.err = unix.EpollCtl(poll, unix.EPOLL_CTL_MOD, v.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: index})
		}
		if v.err == nil {
			return
		}
	} else {
		var p [1]byte
		switch m, err := unix.Read(v.fd, p[:]); {
		case err != nil:
			v.err = err
		case m == 0:
			v.err = io.ErrUnexpectedEOF
		default:
			v.first = time.Since(v.start)
		}
	}
	v.done = true
	unix.EpollCtl(poll, unix.EPOLL_CTL_DEL, v.fd, nil)
}

// finish finds out how it went, and closes without TIME_WAIT.
func (v *visit) finish() {
	v.retried = retried(v.fd)
	rawClient(v.fd).close()
}

func answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(burstTimeout))
	var p [1]byte
	if _, err := c.Read(p[:]); err == nil {
		c.Write(answerByte)
		c.Read(p[:]) // until the client is gone, who leaves no TIME_WAIT
	}
}
