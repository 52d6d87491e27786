//go:build linux

// A web server that uses net.Listen: go run ./internal/alone/webnet 127.0.0.1:8080 shutdown
package main

import (
	"net"

	"github.com/acceptq/acceptq/bench/internal/alone/web"
)

func main() {
	web.Serve(func(addr string) (net.Listener, error) { return net.Listen("tcp", addr) })
}
