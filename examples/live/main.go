// Command live is a web server with a page that shows its accept queue while you load it.
// It is a module of its own, since the page needs github.com/arl/statsviz:
//
//	cd examples/live
//	go run . -load 40
//
// Then open http://127.0.0.1:8081/debug/statsviz/, the address that the program prints. The
// first plots of the page are those of the accept queue: its length and capacity, drops, and
// the time in the queue. Plots of the Go runtime follow. If the program runs on another
// machine, forward the port: ssh -L 8081:127.0.0.1:8081 HOST, or pass -admin :8081.
//
// The server takes a limited number of connections at a time, as servers with a pool of
// workers do. The others wait in the accept queue. With -load the program loads itself in
// waves. Without it, use a load generator of your own on the address of -addr.
package main

import (
	"bytes"
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
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "live: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c, func(page string) error {
		_, err := fmt.Println("open", page)
		return err
	}); err != nil {
		fmt.Fprintln(os.Stderr, "live:", err)
		os.Exit(1)
	}
}

// root is the path of the page.
const root = "/debug/statsviz/"

// oursFirst puts the plots of the accept queue before those of the Go runtime. The page
// shows its plots in a grid, and has no option for their order.
func oursFirst(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != root {
			h.ServeHTTP(w, r)
			return
		}
		for _, conditional := range []string{"If-Modified-Since", "If-None-Match", "Range"} {
			r.Header.Del(conditional)
		}
		page := &page{header: make(http.Header)}
		h.ServeHTTP(page, r)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Write(bytes.Replace(page.Bytes(), []byte("</head>"),
			[]byte("<style>#plots > [id^=accept-] { order: -1 }</style></head>"), 1))
	})
}

// A page is a response that is kept in memory.
type page struct {
	bytes.Buffer
	header http.Header
}

func (p *page) Header() http.Header { return p.header }
func (p *page) WriteHeader(int)     {}

// run serves until ctx ends. It calls ready with the address of the page.
func run(ctx context.Context, c config, ready func(page string) error) error {
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
	if _, err := fmt.Printf("listening on %v; %v\n", ln.Addr(), ln.Backlog()); err != nil {
		return err
	}

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
	pages := &http.Server{Handler: oursFirst(mux)}
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
	if err := ready("http://" + admin.Addr().String() + root); err != nil {
		return err
	}
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
