//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	libp2p "github.com/libp2p/go-reuseport"
	fasthttp "github.com/valyala/fasthttp/reuseport"
	"github.com/valyala/tcplisten"
)

const restartClients = 64 // at once

// A restarter replaces a server by its successor.
type restarter struct {
	name   string
	listen func(addr string) (net.Listener, error)
	// before is what it does before Shutdown; nil is nothing.
	before func(*generation) error
	// How the successor gets the port: from its predecessor, by listening beside
	// it, or else once it is free.
	inherits, beside bool
}

var restarters = []restarter{
	{name: "net.Listen: Shutdown, then listen", listen: listenNet},
	{name: "net.Listen: the same (control)", listen: listenNet},
	{name: "net.Listen: descriptor passed on, Shutdown", listen: listenPlain, inherits: true},
	{name: "valyala/tcplisten: Shutdown", beside: true, listen: func(addr string) (net.Listener, error) {
		return (&tcplisten.Config{ReusePort: true}).NewListener("tcp4", addr)
	}},
	{name: "libp2p/go-reuseport: Shutdown", beside: true, listen: func(addr string) (net.Listener, error) {
		return libp2p.Listen("tcp4", addr)
	}},
	{name: "fasthttp/reuseport: Shutdown", beside: true, listen: func(addr string) (net.Listener, error) {
		return fasthttp.Listen("tcp4", addr)
	}},
	{name: "acceptq: Shutdown", beside: true, listen: listenShared},
	{name: "acceptq: Drain, then listen", listen: listenOurs, before: drained},
	{name: restartRecipe, beside: true, listen: listenShared, before: drained},
}

const restartRecipe = "acceptq: Drain, Shutdown"

func listenShared(addr string) (net.Listener, error) {
	return acceptq.ListenTCP(addr, acceptq.WithReusePort())
}

// drained is the recipe of Drain: drain, and wait until no connection is before
// its first answer.
func drained(g *generation) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := g.ln.(*acceptq.Listener).Drain(ctx); err != nil {
		return err
	}
	return g.unanswered.wait(ctx)
}

// unanswered is the connections of a server that have had no answer yet.
type unanswered struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func (u *unanswered) note(c net.Conn, s http.ConnState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch s {
	case http.StateNew:
		u.conns[c] = struct{}{}
	case http.StateIdle, http.StateClosed, http.StateHijacked:
		delete(u.conns, c)
	}
}

func (u *unanswered) wait(ctx context.Context) error {
	for tick := time.NewTicker(time.Millisecond); ; {
		u.mu.Lock()
		n := len(u.conns)
		u.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d connections are before their first answer: %w", n, ctx.Err())
		}
	}
}

// A generation is a server from its start to its end.
type generation struct {
	ln         net.Listener
	srv        *http.Server
	unanswered unanswered
	served     chan struct{} // closed when Serve has returned
}

func newGeneration(ln net.Listener) *generation {
	g := &generation{ln: ln, served: make(chan struct{})}
	g.unanswered.conns = map[net.Conn]struct{}{}
	g.srv = &http.Server{Handler: http.HandlerFunc(httpHandler), ConnState: g.unanswered.note}
	go func() { defer close(g.served); g.srv.Serve(ln) }()
	return g
}

func (g *generation) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return g.srv.Shutdown(ctx)
}

// replace starts the successor of g and ends g.
func (r *restarter) replace(g *generation) (*generation, error) {
	addr := g.ln.Addr().String()
	next := func() (*generation, error) {
		ln, err := r.listen(addr)
		if err != nil {
			return nil, err
		}
		return newGeneration(ln), nil
	}
	var successor *generation
	switch {
	case r.inherits:
		file, err := g.ln.(*net.TCPListener).File()
		if err != nil {
			return nil, err
		}
		ln, err := net.FileListener(file)
		file.Close()
		if err != nil {
			return nil, err
		}
		successor = newGeneration(ln)
	case r.beside:
		var err error
		if successor, err = next(); err != nil {
			return nil, err
		}
	}
	if r.before != nil {
		if err := r.before(g); err != nil {
			return successor, err
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- g.shutdown() }()
	<-g.served
	if successor == nil {
		var err error
		if successor, err = next(); err != nil {
			return nil, err
		}
	}
	return successor, <-ended
}

// measureRestart replaces a server again and again while clients come, each with a
// connection of its own for every request.
func measureRestart(c config) (*Result, error) {
	r := &Result{Title: "5. Restart"}
	for _, load := range []struct {
		name, title string
		rest        time.Duration
	}{
		{"busy", "never rest", 0},
		{"calm", "rest for about 20 ms between requests", 20 * time.Millisecond},
	} {
		t, worst, restarts, err := restarting(c, load.rest)
		if err != nil {
			return nil, err
		}
		t.Name, t.Title = load.name, fmt.Sprintf("Clients lost and stalled in one restart; %d clients %s", restartClients, load.title)
		r.Tables = append(r.Tables, t)
		r.Goals = append(r.Goals, Goal{
			Text:   fmt.Sprintf("%s, clients %s: 0 lost", restartRecipe, load.title),
			Figure: fmt.Sprintf("%s lost for a restart, %s in the worst of %d rounds of %d", t.cell(restartRecipe, "lost").format(""), digits(worst), c.rounds, restarts),
			Holds:  worst == 0,
		})
	}
	return r, nil
}

// restarting measures under one load. The worst is that of the recipe.
func restarting(c config, rest time.Duration) (t Table, worst float64, restarts int, err error) {
	restarts = pick(c, 2, 1)
	size := len(restarters)
	asked, refused, reset := newSamples(size, c.rounds), newSamples(size, c.rounds), newSamples(size, c.rounds)
	lost, stalled, took := newSamples(size, c.rounds), newSamples(size, c.rounds), newSamples(size, c.rounds)
	err = interleave(c, size, func(round, i int) error {
		s, err := underLoad(c, &restarters[i], restarts, rest)
		if err != nil {
			return fmt.Errorf("%s: %w", restarters[i].name, err)
		}
		if round >= 0 {
			per := float64(restarts)
			asked[i][round] = float64(s.asked.Load()) / per
			refused[i][round] = float64(s.refused.Load()) / per
			reset[i][round] = float64(s.reset.Load()) / per
			lost[i][round] = refused[i][round] + reset[i][round]
			stalled[i][round] = float64(s.stalled.Load()) / per
			took[i][round] = float64(s.took) / per
			if restarters[i].name == restartRecipe {
				worst = max(worst, lost[i][round])
			}
		}
		return nil
	})
	t.Columns = []Column{{"requests", ""}, {"lost", ""}, {"refused", ""}, {"reset", ""}, {"stalled", ""}, {"a restart takes", "ns"}}
	t.Note = "lost: refused, reset or unanswered; stalled: answered, after a packet had to be sent again"
	for i := range restarters {
		t.Rows = append(t.Rows, Row{restarters[i].name, []*Summary{
			summarize(asked[i]), summarize(lost[i]), summarize(refused[i]), summarize(reset[i]), summarize(stalled[i]), summarize(took[i]),
		}})
	}
	return t, worst, restarts, err
}

// A tally is what became of the clients of some restarts.
type tally struct {
	asked, refused, reset, stalled atomic.Int64
	took                           time.Duration
}

func underLoad(c config, r *restarter, restarts int, rest time.Duration) (*tally, error) {
	ln, err := r.listen("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := newGeneration(ln)
	addr := ln.Addr()
	var t tally
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range restartClients {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				e := ask(addr, 10*time.Second, httpRequest, httpAnswer)
				t.asked.Add(1)
				switch {
				case errors.Is(e.err, syscall.ECONNREFUSED):
					t.refused.Add(1)
				case e.err != nil:
					t.reset.Add(1)
				case e.retried:
					t.stalled.Add(1)
				}
				if rest > 0 {
					time.Sleep(rest/2 + rand.N(rest)) // they do not come in step
				}
			}
		})
	}
	// Longer than a client stalls, so that all are there again.
	between := pick(c, 1200*time.Millisecond, 10*time.Millisecond)
	for range restarts {
		time.Sleep(between)
		start := time.Now()
		successor, rerr := r.replace(g)
		if successor != nil {
			g = successor
		}
		if err = rerr; err != nil {
			break
		}
		t.took += time.Since(start)
	}
	time.Sleep(between / 8)
	close(stop)
	clients.Wait() // those that stalled come again after a second
	return &t, errors.Join(err, g.shutdown())
}
