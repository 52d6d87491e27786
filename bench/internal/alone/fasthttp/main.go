//go:build linux

// An echo server that uses fasthttp/reuseport: go run ./internal/alone/fasthttp 127.0.0.1:8080
package main

import (
	"os"

	"github.com/acceptq/acceptq/bench/internal/alone/echo"
	"github.com/valyala/fasthttp/reuseport"
)

func main() { echo.Serve(reuseport.Listen("tcp4", os.Args[1])) }
