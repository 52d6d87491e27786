// Command http is a web server that reports the state of its accept queue. On the address
// of -addr it serves clients:
//
//	/               answers hello, or 503 to a client that has waited too long for Accept
//
// On the address of -admin it serves those who watch it. A request there does not wait in
// the queue that it asks about:
//
//	/healthz        200, or 503 if the server no longer accepts clients
//	/debug/backlog  the backlog: requested, granted, ceiling; and the distribution of
//	                the times in the queue since the start. With ?waiting also the
//	                clients that wait now
//	/debug/vars     the variables of package expvar, with the current queue
//
// The server logs a warning when the queue is more than 80 % full, with a maximum of one
// warning a minute. If Accept has not been called for a second while clients wait, it
// logs the client that has waited longest. On SIGINT or SIGTERM it stops with package
// graceful, which loses no request.
package main

import (
	"bufio"
	"context"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	"github.com/acceptq/acceptq/observe"
	"github.com/acceptq/acceptq/overload"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to listen on")
	admin := flag.String("admin", "127.0.0.1:8081", "address of /healthz and /debug")
	backlog := flag.Int("backlog", acceptq.MaxBacklog, "backlog to request from the kernel, in connections; a negative number requests the maximum")
	budget := flag.Duration("budget", 500*time.Millisecond, "answer 503 to a client that waited longer than this for Accept; 0 means no limit")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "http: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, stop, *addr, *admin, *backlog, *budget); err != nil {
		fmt.Fprintln(os.Stderr, "http:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends. Then it calls giveBack, which restores the default
// handling of signals.
func run(ctx context.Context, giveBack func(), addr, adminAddr string, backlog int, budget time.Duration) error {
	ln, err := acceptq.ListenTCP(addr, acceptq.WithBacklog(backlog))
	if err != nil {
		return err
	}
	defer ln.Close()
	admin, err := net.Listen("tcp", adminAddr)
	if err != nil {
		return err
	}
	defer admin.Close()
	out := bufio.NewWriter(os.Stdout)
	fmt.Fprintln(out, "listening on", ln.Addr())
	fmt.Fprintln(out, ln.Backlog())
	fmt.Fprintln(out, "health and debug on", admin.Addr())
	if err := out.Flush(); err != nil {
		return err
	}

	var times queueTimes
	queues := observe.NewSet(observe.Config{
		Interval:   10 * time.Millisecond,
		OldestWait: time.Second,
		Export:     func(*observe.Queue) observe.Exporter { return &times },
	})
	defer queues.Close()
	queue, err := queues.Add("http", ln)
	if err != nil {
		return err
	}
	expvar.Publish("acceptQueues", queues)
	shed := overload.NewShedder(budget)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "hello")
	})
	srv := &http.Server{
		Handler: shed.Handler(mux),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return shed.ConnContext(queue.ConnContext(ctx, c), c)
		},
		ReadHeaderTimeout: 10 * time.Second,
	}
	watchers := http.NewServeMux()
	watchers.Handle("GET /healthz", overload.Health(5*time.Second, ln))
	watchers.HandleFunc("GET /debug/backlog", serveBacklog(ln, &times, shed))
	watchers.Handle("GET /debug/vars", expvar.Handler())
	adminSrv := &http.Server{Handler: watchers, ReadHeaderTimeout: 10 * time.Second}
	defer adminSrv.Close()

	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() {
		if err := adminSrv.Serve(admin); !errors.Is(err, http.ErrServerClosed) {
			fail(err)
		}
	}()
	go watchQueue(ctx, ln)
	err = graceful.Serve(ctx, srv, ln,
		graceful.WithOnStop(giveBack), // a second signal ends the process at once
		graceful.WithLogger(slog.Default()))
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// watchQueue looks at the queue each second until ctx ends.
func watchQueue(ctx context.Context, ln *acceptq.Listener) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var fill watch
	var accept watchdog
	for {
		select {
		case now := <-tick.C:
			if s, err := ln.Stats(); err == nil {
				fill.look(now, s)
				accept.look(ctx, ln.Accepted(), s, ln.Waiting)
			}
		case <-ctx.Done():
			return
		}
	}
}

// watch logs a warning when a queue is nearly full.
type watch struct {
	warned time.Time // time of the last warning
}

// look logs a warning if the queue is more than 80 % full, unless it has done so within
// the last minute. It does not warn if the length of the queue is unknown.
func (w *watch) look(now time.Time, s acceptq.Stats) {
	part, known := s.Utilization()
	if !known || part <= 0.8 || now.Sub(w.warned) < time.Minute {
		return
	}
	w.warned = now
	slog.Warn("the accept queue is filling up: the server calls Accept too rarely", "queue", s)
}
