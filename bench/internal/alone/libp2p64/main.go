//go:build linux

// An echo server with 64 listeners of libp2p/go-reuseport on one port, made by
// hand: go run ./internal/alone/libp2p64 127.0.0.1:8080
package main

import (
	"net"
	"os"

	"github.com/acceptq/acceptq/bench/internal/alone/echo"
	"github.com/libp2p/go-reuseport"
)

func main() {
	var all [64]net.Listener
	for i := range all {
		var err error
		if all[i], err = reuseport.Listen("tcp4", os.Args[1]); err != nil {
			panic(err)
		}
	}
	for _, ln := range all {
		go echo.Serve(ln, nil)
	}
	select {}
}
