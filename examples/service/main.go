// Command service is a web server to copy for a first deploy. It is restarted without losing
// a request, in one of two ways:
//
//   - The new process starts before the old one gets its SIGTERM, as in Kubernetes. Both
//     listen, because of acceptq.WithReusePort. See kubernetes.yaml.
//   - systemd listens, and passes its socket to the service. See service.socket and
//     service.service.
//
// A second port has what is not for clients:
//
//	/ready       200, and 503 once the server has been told to stop
//	/debug/vars  the variables of package expvar, with the accept queue
package main

import (
	"context"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
)

func main() {
	addr := flag.String("addr", ":8080", "address to listen on, unless systemd passes a socket")
	metrics := flag.String("metrics", ":9090", "address of /ready and /debug/vars")
	delay := flag.Duration("delay", 0, "how long to serve as before after SIGTERM, until load balancers have noticed")
	timeout := flag.Duration("timeout", 25*time.Second, "how long the whole stop may take")
	flag.Parse()
	log.SetFlags(0)
	log.SetPrefix("service: ")
	if flag.NArg() > 0 {
		log.Printf("unexpected argument %q", flag.Arg(0))
		os.Exit(2)
	}
	if err := run(*addr, *metrics, *delay, *timeout); err != nil {
		log.Fatal(err) // nil after an ordinary stop; what was cut off otherwise
	}
}

func run(addr, metrics string, delay, timeout time.Duration) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	ln, opts, err := listen(addr)
	if err != nil {
		return err
	}
	defer ln.Close()

	var stopping atomic.Bool
	expvar.Publish("acceptQueue", expvar.Func(func() any { s, _ := ln.Stats(); return s }))
	http.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if stopping.Load() {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		}
	}) // package expvar has added /debug/vars
	side, err := acceptq.ListenTCP(metrics, acceptq.WithReusePort())
	if err != nil {
		return err
	}
	defer side.Close() // after graceful.Serve: it answers until the end
	go http.Serve(side, nil)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello\n") })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}

	// What runs this program may wait for this line, or for READY=1 of sd_notify(3).
	fmt.Println("listening on", ln.Addr(), "and", side.Addr(), "-", ln.Backlog())
	if err := notify("READY=1"); err != nil {
		return err
	}
	return graceful.Serve(ctx, srv, ln, append(opts,
		graceful.WithOnStop(func() { stopping.Store(true) }),
		graceful.WithDelay(delay),
		graceful.WithTimeout(timeout),
		graceful.WithAbortSignal(syscall.SIGTERM, os.Interrupt), // a second one stops at once
		graceful.WithLogger(slog.Default()))...)
}

// listen returns the socket that systemd passes, see sd_listen_fds(3), or listens on addr.
func listen(addr string) (*acceptq.Listener, []graceful.Option, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		ln, err := acceptq.ListenTCP(addr, acceptq.WithReusePort())
		return ln, nil, err
	}
	if n := os.Getenv("LISTEN_FDS"); n != "1" {
		return nil, nil, fmt.Errorf("LISTEN_FDS=%s: need 1 socket", n)
	}
	const firstFD = 3
	f := os.NewFile(firstFD, "socket")
	defer f.Close()
	inherited, err := net.FileListener(f)
	if err != nil {
		return nil, nil, err
	}
	ln, err := acceptq.Wrap(inherited)
	if err != nil {
		return nil, nil, err
	}
	// The queue has the length of Backlog= in the unit. The clients of a whole restart wait
	// in it, so it must be long.
	if _, err := ln.SetBacklog(acceptq.MaxBacklog); err != nil {
		return nil, nil, err
	}
	return ln, []graceful.Option{graceful.WithSharedSocket()}, nil
}

// notify tells systemd the state of the service, see sd_notify(3).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, state)
	return errors.Join(err, c.Close())
}
