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
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/valyala/tcplisten"
)

const restartClients = 64 // at the same time

// How the successor gets the port.
type succession int

const (
	after    succession = iota // it listens when its predecessor has closed
	beside                     // it listens beside its predecessor (SO_REUSEPORT)
	inherits                   // it gets a descriptor of its predecessor's socket
)

// A way replaces a server by its successor.
type way struct {
	listen  listenFunc
	succeed succession
	end     func(*generation) error
}

// ways has each of restartNames. Every library has the best way that we know: it
// waits for first answers.
var ways = map[string]way{
	restartNet:     {listenNet, after, (*generation).shutdown},
	restartControl: {listenNet, after, (*generation).shutdown},
	restartClose:   {listenNet, after, (*generation).closeFirst},
	restartPass:    {listenNet, inherits, (*generation).shutdown},
	restartPassed:  {listenNet, inherits, (*generation).closeFirst},
	restartTCP: {func(addr string) (net.Listener, error) {
		return (&tcplisten.Config{ReusePort: true}).NewListener("tcp4", addr)
	}, beside, (*generation).closeFirst},
	restartFast:    {listenFasthttp, beside, (*generation).closeFirst},
	restartReuse:   {listenLibp2p, beside, (*generation).closeFirst},
	restartMigrate: {listenLibp2p, beside, (*generation).closeFirst},
	restartBeside:  {listenShared, beside, (*generation).shutdown},
	restartAlone:   {listenOurs, after, (*generation).drainFirst},
	restartOurs:    {listenShared, beside, (*generation).drainFirst},
}

func listenShared(addr string) (net.Listener, error) {
	return acceptq.ListenTCP(addr, acceptq.WithReusePort())
}

// A generation is a server from its start to its end.
type generation struct {
	ln     net.Listener
	srv    *http.Server
	served chan struct{} // closed when Serve has returned

	mu      sync.Mutex
	waiting map[net.Conn]struct{} // connections before their first answer
}

func newGeneration(ln net.Listener) *generation {
	g := &generation{ln: ln, served: make(chan struct{}), waiting: map[net.Conn]struct{}{}}
	g.srv = &http.Server{Handler: http.HandlerFunc(httpHandler), ConnState: func(c net.Conn, s http.ConnState) {
		g.mu.Lock()
		defer g.mu.Unlock()
		switch s {
		case http.StateNew:
			g.waiting[c] = struct{}{}
		case http.StateIdle, http.StateClosed, http.StateHijacked:
			delete(g.waiting, c)
		}
	}}
	go func() { defer close(g.served); g.srv.Serve(ln) }()
	return g
}

func (g *generation) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return g.srv.Shutdown(ctx)
}

// wait returns when no connection is before its first answer.
func (g *generation) wait() error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		n := len(g.waiting)
		g.mu.Unlock()
		if n == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d connections are before their first answer", n)
		}
	}
}

// closeFirst closes the listener, so that Serve returns and accepts no more.
func (g *generation) closeFirst() error {
	if err := g.ln.Close(); err != nil {
		return err
	}
	<-g.served // every connection that was accepted has been noted
	if err := g.wait(); err != nil {
		return err
	}
	return g.shutdown()
}

// drainFirst is the recipe in the documentation of Listener.Drain.
func (g *generation) drainFirst() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := g.ln.(*acceptq.Listener).Drain(ctx); err != nil {
		return err
	}
	if err := g.wait(); err != nil {
		return err
	}
	return g.shutdown()
}

// successor starts the successor of g.
func (w way) successor(g *generation) (*generation, error) {
	var ln net.Listener
	var err error
	if w.succeed == inherits {
		file, ferr := g.ln.(*net.TCPListener).File()
		if ferr != nil {
			return nil, ferr
		}
		defer file.Close()
		ln, err = net.FileListener(file)
	} else {
		ln, err = w.listen(g.ln.Addr().String())
	}
	if err != nil {
		return nil, err
	}
	return newGeneration(ln), nil
}

// replace starts the successor of g and ends g.
func (w way) replace(g *generation) (next *generation, err error) {
	if w.succeed != after {
		if next, err = w.successor(g); err != nil {
			return nil, err
		}
		return next, w.end(g)
	}
	ended := make(chan error, 1)
	go func() { ended <- w.end(g) }()
	<-g.served // the listener is closed; the rest goes on beside the successor
	if next, err = w.successor(g); err != nil {
		return nil, err
	}
	return next, <-ended
}

// BenchmarkRestart replaces a server once while clients come, each with a new
// connection for every request. Both servers run in this process.
func BenchmarkRestart(b *testing.B) {
	for _, load := range []struct {
		name string
		rest time.Duration
	}{{"busy", 0}, {"calm", 20 * time.Millisecond}} {
		b.Run("clients="+load.name, func(b *testing.B) {
			shuffled(b, restartNames, func(b *testing.B, name string) {
				migrate := 0
				if name == restartMigrate {
					migrate = 1
				}
				if err := setSysctl("net.ipv4.tcp_migrate_req", migrate); err != nil {
					b.Fatal(err)
				}
				ways[name].underLoad(b, load.rest)
			})
		})
	}
}

// underLoad restarts a server once, and counts what becomes of the requests.
func (w way) underLoad(b *testing.B, rest time.Duration) {
	ln, err := w.listen("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	g := newGeneration(ln)
	stop := make(chan struct{})
	var asked, refused, reset, stalled atomic.Int64
	var clients sync.WaitGroup
	for range restartClients {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				e := ask(ln.Addr(), 20*time.Second)
				asked.Add(1)
				switch {
				case errors.Is(e.err, syscall.ECONNREFUSED):
					refused.Add(1)
				case e.err != nil:
					reset.Add(1)
				case e.retried:
					stalled.Add(1)
				}
				if rest > 0 {
					time.Sleep(rest/2 + rand.N(rest)) // clients do not keep step
				}
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	b.ResetTimer()
	next, err := w.replace(g)
	b.StopTimer()
	if err != nil {
		b.Error(err)
	}
	time.Sleep(100 * time.Millisecond)
	close(stop)
	clients.Wait() // a stalled client takes a second or more
	if next == nil {
		next = g
	}
	if err := next.shutdown(); err != nil {
		b.Error(err)
	}
	b.ReportMetric(float64(asked.Load()), "requests")
	b.ReportMetric(float64(refused.Load()+reset.Load()), "lost")
	b.ReportMetric(float64(refused.Load()), "refused")
	b.ReportMetric(float64(reset.Load()), "reset")
	b.ReportMetric(float64(stalled.Load()), "stalled")
}
