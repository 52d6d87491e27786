// Command watch shows how an accept queue fills, overflows and empties. It starts a
// server that accepts slowly on purpose, and clients that connect in waves faster than
// the server can accept. On a terminal it draws a bar that it updates in place. Otherwise
// it prints a line each second.
//
// Try it with -backlog 5, or with a backlog above the ceiling of the system. It ends on
// SIGINT, SIGTERM or SIGHUP, or after -for.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
)

// The server accepts 30 clients a second. In each period of 6 s, 60 clients a second
// connect for 2 s. That is too many during the wave, but not on average.
const (
	pause      = time.Second / 30 // after each Accept
	arrival    = time.Second / 60 // between two clients of a wave
	wave       = 2 * time.Second
	period     = 6 * time.Second
	maxClients = 200 // at the same time
)

func main() {
	backlog := flag.Int("backlog", 32, "backlog to request from the kernel, in connections; a negative number requests the maximum")
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	span := flag.Duration("for", 0, "how long to run, for example 10s; 0 means until a signal")
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		misused("unexpected argument %q", flag.Arg(0))
	case *span < 0:
		misused("-for %v: it must not be negative", *span)
	}

	ctx, stop := signal.NotifyContext(context.Background(), endSignals...)
	defer stop()
	if *span > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *span)
		defer cancel()
	}
	if err := run(ctx, os.Stdout, isTerminal(os.Stdout), *addr, *backlog); err != nil {
		fmt.Fprintln(os.Stderr, "watch:", err)
		os.Exit(1)
	}
}

// misused reports wrong use in one line and ends the program.
func misused(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "watch:", fmt.Sprintf(format, args...))
	os.Exit(2)
}

// isTerminal reports whether f is a terminal that can overwrite a line.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 &&
		os.Getenv("TERM") != "dumb" && runtime.GOOS != "windows"
}

// run listens, serves and watches until ctx ends.
func run(ctx context.Context, w io.Writer, terminal bool, addr string, backlog int) error {
	out := bufio.NewWriter(w) // it keeps the first error for Flush
	ln, err := acceptq.ListenTCP(addr, acceptq.WithBacklog(backlog))
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Fprintln(out, "listening on", ln.Addr())
	fmt.Fprintln(out, ln.Backlog())
	fmt.Fprintf(out, "the server accepts %d clients a second; waves of %d clients a second last %v and start every %v\n\n",
		time.Second/pause, time.Second/arrival, wave, period)

	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	var served atomic.Int64
	failed := make(chan error, 1)
	context.AfterFunc(ctx, func() { ln.Close() })
	work.Go(func() {
		if err := serve(ctx, ln, &served); err != nil {
			failed <- err
			cancel()
		}
	})
	work.Go(func() { load(ctx, ln.Addr()) })

	if err := watch(ctx, out, terminal, ln, &served); err != nil {
		return err
	}
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// serve accepts and greets one client at a time, slowly.
func serve(ctx context.Context, ln net.Listener, served *atomic.Int64) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		fmt.Fprintln(c, "hello")
		c.Close()
		served.Add(1)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// load sends waves of clients. If the full queue drops a client's SYN, its kernel
// retries until the client is served or ctx ends.
func load(ctx context.Context, addr net.Addr) {
	var clients sync.WaitGroup
	defer clients.Wait()
	room := make(chan struct{}, maxClients)
	tick := time.NewTicker(arrival)
	defer tick.Stop()
	for start := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if now.Sub(start)%period >= wave {
				continue
			}
		}
		select {
		case room <- struct{}{}:
		default:
			continue // maxClients is reached
		}
		clients.Go(func() {
			defer func() { <-room }()
			c, err := new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
			if err != nil {
				return
			}
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			io.Copy(io.Discard, c)
		})
	}
}
