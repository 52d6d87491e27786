//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"golang.org/x/sys/unix"
)

// A rawClient is a connected socket outside Go's poller, so that many of them cost
// little CPU time.
type rawClient int

// connectRaw connects to addr, whose queue must have room, and sends one byte, because
// the listener of fasthttp does not accept a silent client.
func connectRaw(addr net.Addr) (rawClient, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	c := rawClient(fd)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 10})
	err = unix.EINTR
	for err == unix.EINTR { // the handshake continues after a signal
		err = unix.Connect(fd, loopback(addr))
	}
	if err == nil || err == unix.EISCONN {
		_, err = unix.Write(fd, []byte{'x'})
	}
	if err != nil {
		c.close()
		return -1, fmt.Errorf("connect: %w", err)
	}
	return c, nil
}

// loopback returns the port of addr on 127.0.0.1.
func loopback(addr net.Addr) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: addr.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
}

// close resets the connection, so that no TIME_WAIT fills the kernel's table.
func (c rawClient) close() {
	unix.SetsockoptLinger(int(c), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(int(c))
}

func awaitQueued(ln net.Listener, n int) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s, err := acceptq.ReadStats(ln.(syscall.Conn))
		if err != nil || s.Queued >= n {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d of %d clients are in the queue", s.Queued, n)
		}
	}
}

var (
	httpRequest = []byte("GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
	httpAnswer  = []byte("answered")
)

func httpHandler(w http.ResponseWriter, _ *http.Request) { w.Write(httpAnswer) }

// An exchange is the result of one request.
type exchange struct {
	err     error
	retried bool // a packet was retransmitted
}

// ask sends one HTTP request over a new connection and reads its answer.
func ask(addr net.Addr, timeout time.Duration) (e exchange) {
	deadline := time.Now().Add(timeout)
	d := net.Dialer{Deadline: deadline, KeepAlive: -1}
	c, err := d.Dial("tcp4", addr.String())
	if err != nil {
		return exchange{err: err}
	}
	conn := c.(*net.TCPConn)
	defer func() {
		e.retried = resent(conn)
		conn.SetLinger(0)
		conn.Close()
	}()
	conn.SetDeadline(deadline)
	if _, err := conn.Write(httpRequest); err != nil {
		return exchange{err: err}
	}
	var buffer [512]byte
	for n := 0; ; {
		m, err := conn.Read(buffer[n:])
		if n += m; bytes.HasSuffix(buffer[:n], httpAnswer) {
			return e
		}
		if err == io.EOF || err == nil && n == len(buffer) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return exchange{err: err}
		}
	}
}

// retried reports whether the kernel of the client had to retransmit a packet.
func retried(fd int) bool {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.Total_retrans > 0
}

// resent is retried for a connection of package net.
func resent(c *net.TCPConn) (yes bool) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { yes = retried(int(fd)) })
	}
	return yes
}
