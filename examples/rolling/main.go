// Command rolling restarts an HTTP server on its port again and again, under load from
// clients of its own, and prints what the clients saw. Each server is a process of
// its own; serve is the part to copy.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
)

// The ways to stop a server.
const (
	stopGraceful = "graceful" // graceful.Serve
	stopShutdown = "shutdown" // http.Server.Shutdown alone
)

// maxClients is more than the ports of one address serve.
const maxClients = 50000

type config struct {
	stop     string
	overlap  bool
	restarts int
	clients  int
}

func main() {
	var c config
	flag.StringVar(&c.stop, "stop", stopGraceful, "how a server stops: "+stopGraceful+" or "+stopShutdown)
	flag.BoolVar(&c.overlap, "overlap", true, "the next server listens before the current one stops")
	flag.IntVar(&c.restarts, "restarts", 40, "how often to restart the server")
	flag.IntVar(&c.clients, "clients", 64, "how many clients send requests")
	addr := flag.String("serve", "", "be one of the servers, on this address, until the standard input ends")
	flag.Parse()
	fail := func(status int, err error) {
		fmt.Fprintln(os.Stderr, "rolling:", err)
		os.Exit(status)
	}
	switch {
	case flag.NArg() > 0:
		fail(2, fmt.Errorf("unexpected argument %q", flag.Arg(0)))
	case c.stop != stopGraceful && c.stop != stopShutdown:
		fail(2, fmt.Errorf("-stop %q: must be %s or %s", c.stop, stopGraceful, stopShutdown))
	case c.restarts < 1:
		fail(2, fmt.Errorf("-restarts %d: must be 1 or more", c.restarts))
	case c.clients < 1 || c.clients > maxClients:
		fail(2, fmt.Errorf("-clients %d: must be 1 to %d", c.clients, maxClients))
	case *addr != "":
		if err := serve(*addr, c); err != nil {
			fail(1, err)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	saw, done, err := run(ctx, c)
	if saw.ok.Load() > 0 { // an interrupted run has results too
		_, perr := fmt.Printf("%s, overlap %v, %d restarts: %v\n", c.stop, c.overlap, done, saw)
		err = errors.Join(err, perr)
	}
	if err != nil {
		fail(1, err)
	}
}

// serve is a server. A server of yours gets its context from signal.NotifyContext and
// SIGTERM.
func serve(addr string, c config) error {
	signal.Ignore(os.Interrupt) // a terminal sends it to all processes; rolling stops them
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		io.Copy(io.Discard, os.Stdin)
	}()
	var opts []acceptq.Option
	if c.overlap {
		opts = append(opts, acceptq.WithReusePort())
	}
	ln, err := acceptq.ListenTCP(addr, opts...)
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr()) // it listens
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	})}
	if c.stop == stopGraceful {
		return graceful.Serve(ctx, srv, ln)
	}
	go srv.Serve(ln)
	<-ctx.Done()
	return srv.Shutdown(context.Background())
}

// A process is a server that runs.
type process struct {
	cmd  *exec.Cmd
	in   io.Closer
	errs strings.Builder
	addr string
}

// start starts a server and returns when it listens.
func start(addr string, c config) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(self, "-serve", addr, "-stop", c.stop, "-overlap="+strconv.FormatBool(c.overlap))}
	p.cmd.Stderr = &p.errs
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if p.addr, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("a server has not started: %w", p.end())
	}
	p.addr = strings.TrimSpace(p.addr)
	return p, nil
}

// end stops the server and waits for it.
func (p *process) end() error {
	p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(p.errs.String()))
	}
	return nil
}

// run restarts the server, and returns what the clients saw and how many restarts were
// done.
func run(ctx context.Context, c config) (saw *tally, done int, err error) {
	saw = &tally{gap: !c.overlap}
	server, err := start("127.0.0.1:0", c)
	if err != nil {
		return saw, 0, err
	}
	addr := server.addr
	going, goHome := context.WithCancel(ctx)
	var clients sync.WaitGroup
	for i := range c.clients {
		clients.Go(func() { client(going, addr, i%2 == 0, saw) })
	}
	defer func() { // the last server stops when the clients have gone
		goHome()
		clients.Wait()
		if server != nil {
			err = errors.Join(err, server.end())
		}
	}()
	for ; done < c.restarts; done++ {
		if err := saw.more(ctx, c.clients); err != nil {
			return saw, done, fmt.Errorf("ended after %d of %d restarts: %w", done, c.restarts, err)
		}
		old := server
		if server = nil; c.overlap {
			server, err = start(addr, c)
		}
		err = errors.Join(err, old.end())
		if err == nil && !c.overlap {
			server, err = start(addr, c)
		}
		if err != nil {
			return saw, done, err
		}
	}
	return saw, done, saw.more(ctx, c.clients)
}
