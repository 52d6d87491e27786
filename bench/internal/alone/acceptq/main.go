//go:build linux

// An echo server that uses acceptq: go run ./internal/alone/acceptq 127.0.0.1:8080
package main

import (
	"os"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/bench/internal/alone/echo"
)

func main() {
	ln, err := acceptq.ListenTCP(os.Args[1])
	echo.Serve(ln, err)
}
