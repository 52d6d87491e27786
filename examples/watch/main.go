// Command watch shows an accept queue at work. Its server accepts slowly on
// purpose, a load of its own comes in waves that are too much for it, and the
// queue fills up, runs over and empties again under the reader's eyes: in a bar
// that is drawn in place on a terminal, in a line each second elsewhere.
//
// Try it with -backlog 5, or with more than the system grants. It ends on SIGINT,
// SIGTERM or SIGHUP, or after -for.
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

// The server takes 30 clients a second. Each 6 s there come 60 a second for 2 s:
// too many for a while, and not too many in all.
const (
	pause      = time.Second / 30 // after each Accept
	arrival    = time.Second / 60 // between two clients of a wave
	wave       = 2 * time.Second
	period     = 6 * time.Second
	maxClients = 200 // at the same time
)

func main() {
	backlog := flag.Int("backlog", 32, "connections to ask listen(2) for; negative is as many as the system allows")
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	span := flag.Duration("for", 0, "how long to run, as 10s; 0 is until a signal")
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

// isTerminal tells a terminal that can draw a line again from what cannot.
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
	fmt.Fprintln(out, "backlog:", ln.Backlog())
	fmt.Fprintf(out, "the server takes %d clients a second; waves of %d a second come for %v in each %v\n\n",
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

// serve greets one client after another, slowly.
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

// load sends waves of clients. Those that the full queue turns away try again, as
// their kernel does, until they are served or ctx ends.
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
			continue // enough of them
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
