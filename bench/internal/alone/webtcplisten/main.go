//go:build linux

// A web server that uses valyala/tcplisten: go run ./internal/alone/webtcplisten 127.0.0.1:8080 close
package main

import (
	"net"

	"github.com/acceptq/acceptq/bench/internal/alone/web"
	"github.com/valyala/tcplisten"
)

func main() {
	web.Serve(func(addr string) (net.Listener, error) {
		return (&tcplisten.Config{ReusePort: true}).NewListener("tcp4", addr)
	})
}
