//go:build linux

// An echo server that uses shards of acceptq: go run ./internal/alone/shards
// 127.0.0.1:8080 64
package main

import (
	"net"
	"os"
	"strconv"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/bench/internal/alone/echo"
)

func main() {
	n, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	shards, err := acceptq.ListenTCPShards(os.Args[1], n)
	if err != nil {
		panic(err)
	}
	panic(shards.Serve(func(ln net.Listener) error { echo.Serve(ln, nil); return nil }))
}
