//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
)

// A rawClient is a connected socket without a place in Go's poller, so that many
// cost little beside what is measured.
type rawClient int

// connectRaw connects to addr, which has room in its queue, and sends one byte:
// there are peers that hold a silent client back.
func connectRaw(addr net.Addr) (rawClient, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// A socket that waits for ever tells nobody why.
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 10})
	sa := loopback(addr.(*net.TCPAddr).Port)
	err = unix.EINTR
	for err == unix.EINTR { // a signal of the scheduler's: the handshake goes on
		err = unix.Connect(fd, sa)
	}
	if err != nil && err != unix.EISCONN {
		unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	if _, err := unix.Write(fd, []byte{'x'}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return rawClient(fd), nil
}

// loopback is 127.0.0.1, where all of this happens.
func loopback(port int) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
}

// close leaves nothing behind: a reset, and no TIME_WAIT to fill the table.
func (c rawClient) close() {
	unix.SetsockoptLinger(int(c), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(int(c))
}

// fill has n clients wait in the queue of ln, which must hold them.
func fill(ln net.Listener, n int) ([]rawClient, error) {
	clients := make([]rawClient, 0, n)
	for range n {
		c, err := connectRaw(ln.Addr())
		if err != nil {
			return clients, err
		}
		clients = append(clients, c)
	}
	return clients, awaitQueued(ln, n)
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

// An exchange is what became of one client.
type exchange struct {
	err     error
	retried bool // a packet of its had to be sent again
}

// One byte there, one byte back, is all that is said where HTTP is not measured.
var askByte, answerByte = []byte{'?'}, []byte{'!'}

// ask connects, sends request, reads until the answer ends as want does, and
// closes without TIME_WAIT.
func ask(addr net.Addr, timeout time.Duration, request, want []byte) (e exchange) {
	deadline := time.Now().Add(timeout)
	d := net.Dialer{Deadline: deadline, KeepAlive: -1}
	c, err := d.Dial("tcp4", addr.String())
	if err != nil {
		return exchange{err: err}
	}
	conn := c.(*net.TCPConn)
	defer func() {
		if raw, err := conn.SyscallConn(); err == nil && e.err == nil {
			raw.Control(func(fd uintptr) { e.retried = retried(int(fd)) })
		}
		conn.SetLinger(0)
		conn.Close()
	}()
	conn.SetDeadline(deadline)
	if _, e.err = conn.Write(request); e.err != nil {
		return e
	}
	var buffer [512]byte
	for n := 0; ; {
		m, err := conn.Read(buffer[n:])
		n += m
		if n >= len(want) && string(buffer[n-len(want):n]) == string(want) {
			return e
		}
		if err == nil && n == len(buffer) {
			err = errors.New("an answer that is too long")
		}
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			e.err = err
			return e
		}
	}
}

// retried says whether the kernel had to send a packet of a client's again.
func retried(fd int) bool {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.Total_retrans > 0
}
