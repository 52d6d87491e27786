//go:build linux

package main

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/acceptq/acceptq"
	libp2p "github.com/libp2p/go-reuseport"
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
		done := burst(all, clients)
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
	best, roomy := crews[len(crews)-2].name, crews[len(crews)-1].name
	again, gone, drops := t.cell(best, "dropped, came again"), t.cell(best, "lost"), t.cell(best, "packets dropped")
	r.Goals = append(r.Goals, Goal{
		Text:   best + ": 0 dropped",
		Figure: fmt.Sprintf("%s dropped, %s lost, %s packets", again.format(""), gone.format(""), drops.format("")),
		Holds:  again.High == 0 && gone.High == 0,
	}, Goal{
		Text:   fmt.Sprintf("%s: p99 within %v, 1.2 × the stall", best, burstStall*12/10),
		Figure: fmt.Sprintf("%s; %s: %s", t.cell(best, "first byte, p99").format("ns"), roomy, t.cell(roomy, "first byte, p99").format("ns")),
		Holds:  t.cell(best, "first byte, p99").Median <= float64(burstStall*12/10),
	})
	return r, nil
}

// burst has n clients come at once, and the listeners begin to accept after the
// stall. It returns when each client is answered or has given up.
func burst(listeners []net.Listener, n int) []exchange {
	done := make([]exchange, n)
	begin := make(chan struct{})
	var clients sync.WaitGroup
	for k := range done {
		clients.Go(func() {
			<-begin
			done[k] = talk(listeners[0].Addr(), burstTimeout, askByte, answerByte)
		})
	}
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
	close(begin)
	clients.Wait()
	for k := range done { // not meanwhile: it is no part of the burst
		done[k].finish()
	}
	return done
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
