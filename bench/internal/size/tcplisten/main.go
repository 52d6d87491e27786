//go:build linux

// The smallest program that serves with valyala/tcplisten; it is built to be weighed.
package main

import "github.com/valyala/tcplisten"

func main() {
	ln, err := (&tcplisten.Config{}).NewListener("tcp4", ":8080")
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
