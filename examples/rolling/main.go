// Command rolling restarts an HTTP server on its port again and again under load
// from clients of its own, and prints what the clients saw. It shows what is lost
// when a server stops, and what Drain saves; stop is the part to copy.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

// The ways to stop.
const (
	modeClose = "close"                  // Shutdown alone, which closes the listener first
	modeDrain = "drain"                  // Drain, wait until everyone has an answer, Shutdown
	modeRash  = "drain+shutdown-at-once" // Drain, Shutdown
)

func main() {
	mode := flag.String("mode", modeDrain, modeClose+", "+modeDrain+" or "+modeRash)
	restarts := flag.Int("restarts", 40, "how often to restart the server")
	clients := flag.Int("clients", 64, "how many clients come at a time")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "rolling: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if runtime.GOOS != "linux" && *mode != modeClose {
		fmt.Println("this system has no way to keep new clients out: those that connect between Drain and Close are lost")
	}
	saw, err := run(ctx, *mode, *restarts, *clients)
	if saw != nil { // interrupted, it still saw something
		_, perr := fmt.Printf("%-23s %d restarts: %v\n", *mode+",", saw.restarts, saw)
		err = errors.Join(err, perr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "rolling:", err)
		os.Exit(1)
	}
}

// stop ends a server and loses nobody: take in no new client, serve those whom
// the kernel has let in, let each have its first answer, then shut down. Each step
// has a time of its own, so that a client that stays silent takes none from the
// requests that Shutdown waits for; and the server is shut down in every case.
func stop(ctx context.Context, ln *acceptq.Listener, srv *http.Server, first *firstAnswers) error {
	drained := within(ctx, ln.Drain)
	within(ctx, first.wait) // Shutdown gives up a client that is silent for as long
	return errors.Join(drained, srv.Shutdown(ctx))
}

// within gives a step its time.
func within(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return step(ctx)
}

// firstAnswers knows the connections of a server that have not had an answer yet.
// Shutdown may close such a one although its request has come.
type firstAnswers struct{ pending sync.Map }

// connState is for [http.Server.ConnState].
func (f *firstAnswers) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		f.pending.Store(c, nil)
	case http.StateIdle, http.StateHijacked, http.StateClosed:
		f.pending.Delete(c)
	}
}

// wait returns when nobody is waiting for a first answer.
func (f *firstAnswers) wait(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		none := true
		f.pending.Range(func(any, any) bool { none = false; return false })
		if none {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// grace is how long a server may take to stop.
const grace = 20 * time.Second

// run lets servers follow each other on one port, each for as long as it takes to
// answer some requests.
func run(ctx context.Context, mode string, restarts, clients int) (*tally, error) {
	switch mode {
	case modeClose, modeDrain, modeRash:
	default:
		return nil, fmt.Errorf("no mode %q", mode)
	}
	if restarts < 1 || clients < 1 {
		return nil, fmt.Errorf("-restarts %d, -clients %d: both must be 1 or more", restarts, clients)
	}
	saw := new(tally)
	var crowd sync.WaitGroup
	going, goHome := context.WithCancel(ctx)
	defer crowd.Wait()
	defer goHome()
	addr := "127.0.0.1:0" // the port of the first is that of all
	for i := range restarts + 1 {
		ln, err := acceptq.ListenTCP(addr)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			addr = ln.Addr().String()
		}
		warm := make(chan struct{})
		var requests atomic.Int64
		first := new(firstAnswers)
		srv := &http.Server{ConnState: first.connState, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "hello")
			if requests.Add(1) == int64(clients) {
				close(warm)
			}
		})}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		if i == 0 {
			for range clients {
				crowd.Go(func() { client(going, addr, saw) })
			}
		}
		select {
		case <-warm:
		case <-ctx.Done():
		case <-time.After(grace):
		}

		// The last server stops when all clients have gone, in good order.
		if i == restarts || ctx.Err() != nil {
			goHome()
			crowd.Wait()
			err = end(srv.Shutdown)
			err = errors.Join(err, serveError(served))
			if ctx.Err() != nil {
				err = errors.Join(err, fmt.Errorf("interrupted after %d of %d restarts: %w", i, restarts, ctx.Err()))
			}
			saw.restarts = i
			return saw, err
		}
		switch mode {
		case modeClose:
			err = end(srv.Shutdown)
		case modeDrain:
			err = end(func(ctx context.Context) error { return stop(ctx, ln, srv, first) })
		case modeRash:
			err = end(func(ctx context.Context) error { return errors.Join(ln.Drain(ctx), srv.Shutdown(ctx)) })
		}
		if err != nil {
			srv.Close()
		}
		if err := errors.Join(err, serveError(served)); err != nil {
			return nil, err
		}
	}
	return saw, nil
}

// end gives f the time there is for stopping.
func end(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	return f(ctx)
}

// serveError waits for Serve to return; after a Shutdown that is no error.
func serveError(served <-chan error) error {
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// A tally is what the clients saw.
type tally struct {
	ok, lost, stalled atomic.Int64
	restarts          int // that were finished
}

// stall is how long a client may wait without being called stalled. A dropped SYN
// is sent again after a second.
const stall = 900 * time.Millisecond

func (t *tally) String() string {
	return fmt.Sprintf("%d ok, %d lost, %d stalled above %v", t.ok.Load(), t.lost.Load(), t.stalled.Load(), stall)
}

// client comes again and again, with a connection for each request. One that is
// refused, since no server listens for a moment, tries again; one that has
// connected and gets no answer is lost.
func client(ctx context.Context, addr string, saw *tally) {
	for ctx.Err() == nil {
		began := time.Now()
		c, err := net.DialTimeout("tcp", addr, grace)
		if err != nil {
			<-time.After(time.Millisecond)
			continue
		}
		if err := get(c); err != nil {
			saw.lost.Add(1)
			continue
		}
		saw.ok.Add(1)
		if time.Since(began) > stall {
			saw.stalled.Add(1)
		}
	}
}

func get(c net.Conn) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(grace))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: rolling\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && string(body) != "hello" {
		err = fmt.Errorf("answer %q", body)
	}
	return err
}
