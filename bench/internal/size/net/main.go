//go:build linux

// The smallest program that serves with net; it is built to be weighed.
package main

import "net"

func main() {
	ln, err := net.Listen("tcp4", ":8080")
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
