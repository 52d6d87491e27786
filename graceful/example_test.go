package graceful_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
)

// Restart a server without losing a request: start the new process, then send SIGTERM
// to the old one.
func Example() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	srv := &http.Server{Handler: http.FileServer(http.Dir("."))}

	ln, err := acceptq.ListenTCP(":8080", acceptq.WithReusePort())
	if err != nil {
		log.Fatal(err)
	}
	if err := graceful.Serve(ctx, srv, ln); err != nil {
		log.Fatal(err)
	}
}

// The server is told to stop while it answers a request.
func ExampleServe() {
	ctx, stop := context.WithCancel(context.Background())
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		stop()
		io.WriteString(w, "hello")
	})}

	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		resp, err := http.Get("http://" + ln.Addr().String())
		if err != nil {
			log.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		fmt.Println(string(body))
	}()
	// Serve until ctx ends. When Serve returns, the client has its answer, but it may not
	// have printed it yet.
	err = graceful.Serve(ctx, srv, ln)
	fmt.Println(err)
	// Unordered output:
	// hello
	// <nil>
}

// Behind a load balancer the server first reports that it is not ready, and continues to
// serve until the load balancer has noticed. A second signal stops it at once.
func ExampleWithDelay() {
	var ready atomic.Bool
	ready.Store(true)
	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		}
	})

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ln, err := acceptq.ListenTCP(":8080")
	if err != nil {
		log.Fatal(err)
	}
	err = graceful.Serve(ctx, new(http.Server), ln,
		graceful.WithOnStop(func() { ready.Store(false) }),
		graceful.WithDelay(5*time.Second),
		graceful.WithAbortSignal(syscall.SIGTERM, os.Interrupt),
		graceful.WithLogger(slog.Default()))
	var cut *graceful.Error
	if errors.As(err, &cut) {
		log.Printf("%d connections were cut off during a request", cut.Active)
	}
}

// A server of any kind, here an accept loop, is told to stop while it answers a client.
func ExampleRun() {
	ctx, stop := context.WithCancel(context.Background())
	serve := func(ln net.Listener) error {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer nc.Close()
				stop()
				io.WriteString(nc, "hello")
			}()
		}
	}

	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	answer := make(chan string)
	go func() {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			log.Fatal(err)
		}
		defer nc.Close()
		text, _ := io.ReadAll(nc)
		answer <- string(text)
	}()
	err = graceful.Run(ctx, ln, serve, nil)
	fmt.Println(<-answer, err)
	// Output: hello <nil>
}

// Several sockets on one port have several accept queues.
func ExampleServe_shards() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	shards, err := acceptq.ListenTCPShards(":8443", 4, acceptq.WithReusePort())
	if err != nil {
		log.Fatal(err)
	}
	if err := graceful.ServeTLS(ctx, new(http.Server), shards, "cert.pem", "key.pem"); err != nil {
		log.Fatal(err)
	}
}
