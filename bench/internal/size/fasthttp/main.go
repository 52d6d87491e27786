//go:build linux

// The smallest program that serves with fasthttp/reuseport; it is built to be weighed.
package main

import "github.com/valyala/fasthttp/reuseport"

func main() {
	ln, err := reuseport.Listen("tcp4", ":8080")
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
