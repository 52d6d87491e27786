//go:build linux

// An echo server that uses net.Listen: go run ./internal/alone/net 127.0.0.1:8080
package main

import (
	"net"
	"os"

	"github.com/acceptq/acceptq/bench/internal/alone/echo"
)

func main() { echo.Serve(net.Listen("tcp", os.Args[1])) }
