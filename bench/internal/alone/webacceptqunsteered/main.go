//go:build linux

// A web server that uses acceptq without steering: go run ./internal/alone/webacceptqunsteered 127.0.0.1:8080 drain
package main

import (
	"net"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/bench/internal/alone/web"
)

func main() {
	web.Serve(func(addr string) (net.Listener, error) {
		return acceptq.ListenTCP(addr, acceptq.WithReusePort(), acceptq.WithoutSteering())
	})
}
