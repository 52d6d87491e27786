// Command live is a web server with a page that shows its accept queue while you load it.
// It is a module of its own, since the page needs github.com/arl/statsviz:
//
//	cd examples/live
//	go run . -load 40
//
// Then open http://127.0.0.1:8081/debug/statsviz/ and go to the end of the page. The server
// takes a limited number of connections at a time, as servers with a pool of workers do.
// The others wait in the accept queue. With -load the program loads itself in waves;
// without it, use a load generator of your own on the address of -addr.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/arl/statsviz"
)

type config struct {
	addr, admin string
	backlog     int           // passed to acceptq.WithBacklog
	workers     int           // connections that are served at a time
	work        time.Duration // that a request takes
	load        int           // clients of a wave; 0 is no load
	refresh     time.Duration // of the page
}

func main() {
	var c config
	flag.StringVar(&c.addr, "addr", "127.0.0.1:8080", "address of the server")
	flag.StringVar(&c.admin, "admin", "127.0.0.1:8081", "address of the page")
	flag.IntVar(&c.backlog, "backlog", 31, "connections to ask listen(2) for; negative is the maximum")
	flag.IntVar(&c.workers, "workers", 4, "connections to serve at a time")
	flag.DurationVar(&c.work, "work", 50*time.Millisecond, "time that a request takes")
	flag.IntVar(&c.load, "load", 0, "clients that come at once, again and again; 0 is no load")
	flag.DurationVar(&c.refresh, "refresh", time.Second, "interval of the page, which keeps 60 values")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c, func(page string) { fmt.Println("open", page) }); err != nil {
		fmt.Fprintln(os.Stderr, "live:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends. It calls ready with the address of the page.
func run(ctx context.Context, c config, ready func(page string)) error {
	ln, err := acceptq.ListenTCP(c.addr, acceptq.WithBacklog(c.backlog))
	if err != nil {
		return err
	}
	defer ln.Close()
	admin, err := net.Listen("tcp", c.admin)
	if err != nil {
		return err
	}
	defer admin.Close()
	fmt.Printf("listening on %v: %v\n", ln.Addr(), ln.Backlog())

	var q queue
	options, err := q.plots(ln)
	if err != nil {
		return err
	}
	page, err := statsviz.NewServer(append(options, statsviz.SendFrequency(c.refresh))...)
	if err != nil {
		return err
	}
	defer page.Close()
	mux := http.NewServeMux()
	page.Register(mux)

	srv := &http.Server{ConnContext: q.observe, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(c.work)
		fmt.Fprintln(w, "hello")
	})}
	srv.SetKeepAlivesEnabled(false) // so that each request waits in the queue
	served := make(chan error, 2)
	go func() { served <- srv.Serve(&limited{ln, make(chan struct{}, max(c.workers, 1))}) }()
	pages := &http.Server{Handler: mux}
	go func() { served <- pages.Serve(admin) }()
	defer srv.Close()
	defer pages.Close()

	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait.Go(func() { q.sample(ctx, ln) })
	if c.load > 0 {
		wait.Go(func() { waves(ctx, "http://"+ln.Addr().String(), c.load) })
	}
	ready("http://" + admin.Addr().String() + "/debug/statsviz/")
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		return nil
	}
}

// A limited listener accepts a connection only while fewer than cap(busy) are open.
type limited struct {
	net.Listener
	busy chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.busy <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.busy
		return nil, err
	}
	return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.busy })}, nil
}

type limitedConn struct {
	net.Conn
	release func()
}

// NetConn lets QueueTime find the TCP connection.
func (c *limitedConn) NetConn() net.Conn { return c.Conn }

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}

// waves lets n clients come at once, and again when all have been answered, until ctx ends.
func waves(ctx context.Context, url string, n int) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for ctx.Err() == nil {
		var wait sync.WaitGroup
		for range n {
			wait.Go(func() {
				req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
				if err != nil {
					return
				}
				if resp, err := client.Do(req); err == nil {
					resp.Body.Close()
				}
			})
		}
		wait.Wait()
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// median returns the middle one of sorted values; 0 if there is none.
func median[T cmp.Ordered](sorted []T) (m T) {
	if len(sorted) > 0 {
		m = sorted[len(sorted)/2]
	}
	return m
}
