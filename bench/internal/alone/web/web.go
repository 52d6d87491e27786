// Package web is the HTTP server of the programs in the neighboring folders. It uses only
// the standard library.
package web

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// Serve serves HTTP until SIGTERM. The program's arguments are the address, or
// "inherited" for a socket that is descriptor 3, and how to stop:
//   - shutdown: Shutdown
//   - close: close the listener, wait, Shutdown
//   - drain: the listener's Drain, wait, Shutdown
//
// "wait" means to wait until every accepted connection has had its first answer. If the
// address is in use, the server listens as soon as it is free.
func Serve(listen func(addr string) (net.Listener, error)) {
	if err := serve(listen, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(listen func(addr string) (net.Listener, error), addr, end string) error {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	if addr == "inherited" {
		listen = func(string) (net.Listener, error) { return net.FileListener(os.NewFile(3, "socket")) }
	}
	ln, err := listen(addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		fmt.Println("waiting for the port")
		for ; errors.Is(err, syscall.EADDRINUSE); ln, err = listen(addr) {
			time.Sleep(100 * time.Microsecond)
		}
	}
	if err != nil {
		return err
	}
	var unanswered sync.Map // connections before their first answer
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("answered")) }),
		ConnState: func(c net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				unanswered.Store(c, nil)
			case http.StateIdle, http.StateClosed:
				unanswered.Delete(c)
			}
		},
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	fmt.Println("serving")
	<-term
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	switch end {
	case "close":
		if err := ln.Close(); err != nil {
			return err
		}
		<-served // every accepted connection has been stored
	case "drain":
		if err := ln.(interface{ Drain(context.Context) error }).Drain(ctx); err != nil {
			return err
		}
	}
	for left := end != "shutdown"; left && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		left = false
		unanswered.Range(func(any, any) bool { left = true; return false })
	}
	return srv.Shutdown(ctx)
}
