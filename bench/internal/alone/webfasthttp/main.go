//go:build linux

// A web server that uses fasthttp/reuseport: go run ./internal/alone/webfasthttp 127.0.0.1:8080 close
package main

import (
	"net"

	"github.com/acceptq/acceptq/bench/internal/alone/web"
	"github.com/valyala/fasthttp/reuseport"
)

func main() {
	web.Serve(func(addr string) (net.Listener, error) { return reuseport.Listen("tcp4", addr) })
}
