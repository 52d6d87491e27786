package interop

import (
	"bufio"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	"github.com/soheilhy/cmux"
	"github.com/valyala/fasthttp"
	"golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
)

func listener() *acceptq.Listener {
	ln, err := acceptq.ListenTCP(":8080", acceptq.WithReusePort())
	if err != nil {
		log.Fatal(err)
	}
	return ln
}

// A gRPC server, with or without TLS of package credentials.
func Example_serveGRPC() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	srv := grpc.NewServer()
	// Register the services here.
	if err := graceful.ServeGRPC(ctx, srv, listener()); err != nil {
		log.Fatal(err)
	}
}

// fasthttp closes idle connections when it shuts down. The handler tells clients to leave
// before that.
func Example_fasthttp() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	var stopping atomic.Bool
	srv := &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) {
		if stopping.Load() {
			ctx.SetConnectionClose()
		}
		ctx.WriteString("hello")
	}}
	err := graceful.Run(ctx, listener(), srv.Serve, srv.ShutdownWithContext,
		graceful.WithOnStop(func() { stopping.Store(true) }),
		graceful.WithLinger(time.Second))
	if err != nil {
		log.Fatal(err)
	}
}

// An SSH server waits for its sessions.
func Example_ssh() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	config := &ssh.ServerConfig{NoClientAuth: true} // and a host key
	serve := func(ln net.Listener) error {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer nc.Close()
				conn, channels, requests, err := ssh.NewServerConn(nc, config)
				if err != nil {
					return
				}
				go ssh.DiscardRequests(requests)
				for channel := range channels {
					channel.Reject(ssh.Prohibited, "no channels here")
				}
				conn.Wait()
			}()
		}
	}
	if err := graceful.Run(ctx, listener(), serve, nil, graceful.WithTimeout(time.Hour)); err != nil {
		log.Fatal(err)
	}
}

// HTTP/1 and gRPC on one port.
func Example_cmux() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	web, rpc := new(http.Server), grpc.NewServer()
	serve := func(ln net.Listener) error {
		mux := cmux.New(ln)
		calls := mux.MatchWithWriters(cmux.HTTP2MatchHeaderFieldSendSettings("content-type", "application/grpc"))
		pages := mux.Match(cmux.HTTP1Fast())
		go rpc.Serve(calls)
		go web.Serve(pages)
		return mux.Serve()
	}
	shutdown := func(ctx context.Context) error {
		rpc.GracefulStop()
		return web.Shutdown(ctx)
	}
	if err := graceful.Run(ctx, listener(), serve, shutdown); err != nil {
		log.Fatal(err)
	}
}

// A loop of one's own needs nothing else.
func Example_loop() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	serve := func(ln net.Listener) error {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer nc.Close()
				line, err := bufio.NewReader(nc).ReadString('\n')
				if err == nil {
					io.WriteString(nc, line)
				}
			}()
		}
	}
	if err := graceful.Run(ctx, listener(), serve, nil); err != nil {
		log.Fatal(err)
	}
}
