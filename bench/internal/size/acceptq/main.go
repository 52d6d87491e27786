//go:build linux

// The smallest program that serves with acceptq; it is built to be weighed.
package main

import "github.com/acceptq/acceptq"

func main() {
	ln, err := acceptq.ListenTCP(":8080")
	if err != nil {
		panic(err)
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			panic(err)
		}
		c.Write([]byte("answered"))
		c.Close()
	}
}
