//go:build linux

// The smallest program that serves with net and net/http; it is built to see its size.
package main

import (
	"net"
	"net/http"
)

func main() {
	ln, err := net.Listen("tcp4", ":8080")
	if err != nil {
		panic(err)
	}
	panic(http.Serve(ln, nil))
}
