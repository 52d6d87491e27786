//go:build linux

// An echo server that uses valyala/tcplisten: go run ./internal/alone/tcplisten 127.0.0.1:8080
package main

import (
	"os"

	"github.com/acceptq/acceptq/bench/internal/alone/echo"
	"github.com/valyala/tcplisten"
)

func main() { echo.Serve((&tcplisten.Config{}).NewListener("tcp4", os.Args[1])) }
