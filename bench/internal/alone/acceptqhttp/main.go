//go:build linux

// The smallest program that serves with acceptq and net/http; it is built to see its size.
package main

import (
	"net/http"

	"github.com/acceptq/acceptq"
)

func main() {
	ln, err := acceptq.ListenTCP(":8080")
	if err != nil {
		panic(err)
	}
	panic(http.Serve(ln, nil))
}
