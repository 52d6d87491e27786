// Package echo is the echo server of the programs in the neighboring folders. It uses
// only net.
package echo

import "net"

// Serve sends back what clients send. It panics when it cannot accept.
func Serve(ln net.Listener, err error) {
	for err == nil {
		var c net.Conn
		if c, err = ln.Accept(); err == nil {
			go answer(c)
		}
	}
	panic(err)
}

func answer(c net.Conn) {
	defer c.Close()
	var p [64]byte
	for {
		n, err := c.Read(p[:])
		if err != nil {
			return
		}
		c.Write(p[:n])
	}
}
