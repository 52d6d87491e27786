//go:build linux

// A web server that uses libp2p/go-reuseport: go run ./internal/alone/weblibp2p 127.0.0.1:8080 close
package main

import (
	"net"

	"github.com/acceptq/acceptq/bench/internal/alone/web"
	"github.com/libp2p/go-reuseport"
)

func main() {
	web.Serve(func(addr string) (net.Listener, error) { return reuseport.Listen("tcp4", addr) })
}
