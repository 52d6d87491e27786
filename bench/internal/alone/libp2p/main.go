//go:build linux

// An echo server that uses libp2p/go-reuseport: go run ./internal/alone/libp2p 127.0.0.1:8080
package main

import (
	"os"

	"github.com/acceptq/acceptq/bench/internal/alone/echo"
	"github.com/libp2p/go-reuseport"
)

func main() { echo.Serve(reuseport.Listen("tcp4", os.Args[1])) }
