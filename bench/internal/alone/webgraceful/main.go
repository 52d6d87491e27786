//go:build linux

// A web server that uses acceptq and its package graceful: go run ./internal/alone/webgraceful 127.0.0.1:8080
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/bench/internal/alone/web"
	"github.com/acceptq/acceptq/graceful"
)

func main() {
	if err := serve(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(addr string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ln, err := acceptq.ListenTCP(addr, acceptq.WithReusePort())
	if err != nil {
		return err
	}
	fmt.Println("serving")
	srv := web.New()
	if srv.TLSConfig != nil {
		return graceful.ServeTLS(ctx, srv, ln, "", "")
	}
	return graceful.Serve(ctx, srv, ln)
}
