// Command http is a web server that knows its accept queue.
//
//	/               says hello, or 503 to a client that has waited too long for Accept
//	/debug/backlog  the account of the listener: asked, granted, ceiling; and the
//	                distribution of the times in the queue since the start.
//	                With ?waiting also the clients that wait now
//	/debug/vars     the variables of package expvar, the queue of this moment among them
//
// When the queue passes 80 % of what fits, it logs a warning, at most one a
// minute. When Accept has not been called for a second while clients wait, it logs
// which client has waited longest. SIGINT and SIGTERM stop it once the requests in hand are answered.
package main

import (
	"bufio"
	"context"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to listen on")
	backlog := flag.Int("backlog", -1, "connections to ask listen(2) for; negative is as many as the system allows")
	budget := flag.Duration("budget", 500*time.Millisecond, "answer 503 to a client that waited longer for Accept; 0 answers everyone")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "http: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, stop, *addr, *backlog, *budget); err != nil {
		fmt.Fprintln(os.Stderr, "http:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends; giveBack gives signals back to the system.
func run(ctx context.Context, giveBack func(), addr string, backlog int, budget time.Duration) error {
	ln, err := acceptq.ListenTCP(addr, acceptq.WithBacklog(backlog))
	if err != nil {
		return err
	}
	defer ln.Close()
	out := bufio.NewWriter(os.Stdout)
	fmt.Fprintln(out, "listening on", ln.Addr())
	fmt.Fprintln(out, "backlog:", ln.Backlog())
	if err := out.Flush(); err != nil {
		return err
	}

	expvar.Publish("acceptQueue", expvar.Func(func() any { s, _ := ln.Stats(); return s }))
	mux := http.NewServeMux()
	var times queueTimes
	mux.Handle("GET /{$}", times.shedding(budget, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "hello")
	})))
	mux.HandleFunc("GET /debug/backlog", serveBacklog(ln, &times))
	mux.Handle("GET /debug/vars", expvar.Handler())
	srv := &http.Server{Handler: mux, ConnContext: times.connContext, ReadHeaderTimeout: 10 * time.Second}

	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var queue watch
	var accept watchdog
	for {
		select {
		case now := <-tick.C:
			if s, err := ln.Stats(); err == nil {
				queue.look(now, s)
				accept.look(ctx, times.accepted.Load(), s, ln.Waiting)
			}
		case err := <-served:
			return err
		case <-ctx.Done():
			giveBack() // a second signal ends the process at once
			if err := stop(ln, srv, 10*time.Second); err != nil {
				return err
			}
			if err := <-served; !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		}
	}
}

// stop serves the clients that wait in the queue, and then waits until the requests
// in hand are answered. Each of the two steps has the time d of its own: a drain
// that takes all of its time leaves Shutdown's to the requests. The example
// examples/rolling shows how a server stops without losing any client.
func stop(ln *acceptq.Listener, srv *http.Server, d time.Duration) error {
	step := func(f func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		return f(ctx)
	}
	if err := step(ln.Drain); err != nil {
		slog.Warn("some clients may be reset", "error", err)
	}
	return step(srv.Shutdown)
}

// watch warns of a queue that is getting full.
type watch struct {
	warned time.Time // when it last did
}

// look warns if s is past 80 %, unless it has done so within the last minute. A
// queue of unknown length is no reason.
func (w *watch) look(now time.Time, s acceptq.Stats) {
	part, known := s.Utilization()
	if !known || part <= 0.8 || now.Sub(w.warned) < time.Minute {
		return
	}
	w.warned = now
	slog.Warn("the accept queue is filling up: Accept is called too seldom", "queue", s)
}
