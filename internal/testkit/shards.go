package testkit

import (
	"errors"
	"io"
	"net"
	"time"
)

// Echo serves ln: each connection gets its first byte back.
func Echo(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(Patience))
			p := make([]byte, 1) // io.Copy would use splice(2) and keep a pipe
			if n, _ := c.Read(p); n == 1 {
				c.Write(p)
			}
		}()
	}
}

// AskEcho sends a byte and waits for its echo and for the server's close.
func AskEcho(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{'x'}); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err == nil && string(answer) != "x" {
		err = errors.New("the echo differs from the byte that was sent")
	}
	return err
}
