//go:build !plan9

// Command backlog listens with a small accept queue and shows what the kernel
// granted. It serves one client. Then it connects clients until the queue is full, and
// compares the number that fit with the capacity that the listener reports.
//
// It exits with status 1 if the two differ.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

// patience is how long a client waits for an answer. A kernel whose queue is full
// does not answer, so the client needs a timeout.
const patience = 500 * time.Millisecond

// unknownLimit is the number of clients that connect if the system does not report
// the capacity of the queue.
const unknownLimit = 300

func main() {
	backlog := flag.Int("backlog", 2, "backlog to request from the kernel, in connections; a negative number requests the maximum")
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	network := flag.String("network", "tcp", "tcp, tcp4 or tcp6")
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		misused("unexpected argument %q", flag.Arg(0))
	case *network != "tcp" && *network != "tcp4" && *network != "tcp6":
		misused("-network %q: it must be tcp, tcp4 or tcp6", *network)
	}
	out := bufio.NewWriter(os.Stdout) // it keeps the first error for Flush
	agrees, err := run(out, *network, *addr, *backlog)
	if ferr := out.Flush(); err == nil {
		err = ferr
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "backlog:", err)
	}
	if err != nil || !agrees {
		os.Exit(1)
	}
}

// misused reports wrong use in one line and ends the program.
func misused(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "backlog:", fmt.Sprintf(format, args...))
	os.Exit(2)
}

func run(out *bufio.Writer, network, addr string, backlog int) (agrees bool, err error) {
	ln, err := acceptq.Listen(context.Background(), network, addr, acceptq.WithBacklog(backlog))
	if err != nil {
		return false, err
	}
	defer ln.Close()
	account := ln.Backlog()
	fmt.Fprintln(out, "listening on", ln.Addr())
	fmt.Fprintln(out, account)
	fmt.Fprintln(out, "effective backlog:", ln.EffectiveBacklog())

	at := reach(network, ln)
	if err := session(out, ln, at); err != nil {
		return false, err
	}
	if err := out.Flush(); err != nil {
		return false, err
	}
	return fill(out, ln, at, account.Capacity)
}

// reach returns the address at which a client on this machine can connect to ln. Some
// systems cannot connect to the wildcard address: NetBSD has no route to [::].
func reach(network string, ln net.Listener) string {
	addr := *ln.Addr().(*net.TCPAddr)
	if addr.IP.IsUnspecified() {
		addr.IP = net.IPv4(127, 0, 0, 1)
		if network == "tcp6" {
			addr.IP = net.IPv6loopback
		}
	}
	return addr.String()
}

// session connects a client to at and serves it. The server returns the client's line
// with a "!" at its end. The client closes the connection first, then the server does.
func session(out *bufio.Writer, ln net.Listener, at string) error {
	served := make(chan error, 1)
	go func() { served <- serveOne(ln) }()

	c, err := net.Dial("tcp", at)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(c) // up to the server's close
	if err != nil {
		return err
	}
	if err := <-served; err != nil {
		return err
	}
	fmt.Fprintf(out, "1 accepted: sent \"hello\", received %q, closed in order\n", answer)
	return nil
}

// serveOne accepts one client, echoes its line, and closes once the client has
// half-closed.
func serveOne(ln net.Listener) error {
	c, err := ln.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, line[:len(line)-1]+"!"); err != nil {
		return err
	}
	if _, err := r.ReadByte(); err != io.EOF {
		return fmt.Errorf("after the line: got %v, want the end of the client's data", err)
	}
	return nil
}

// fill connects clients one at a time without accepting any, up to one more than the
// capacity. Then it counts the connections in the queue.
func fill(out *bufio.Writer, ln *acceptq.Listener, at string, capacity int) (agrees bool, err error) {
	tries := capacity + 1
	if capacity < 0 {
		tries = unknownLimit
	}
	next := "also connected"
	for i := range tries {
		c, err := net.DialTimeout("tcp", at, patience)
		if err != nil {
			if !keptOut(err) {
				return false, fmt.Errorf("client %d of %d: %w", i+1, tries, err)
			}
			next = fate(err)
			break
		}
		defer c.Close() // it stays open until the queue is counted
		if i == tries-1 {
			// FreeBSD finishes the handshake before it looks at the queue.
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := c.Read(make([]byte, 1)); err != nil && !timedOut(err) {
				next = "connected and was reset"
			}
		}
	}

	queued, err := survivors(ln)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(out, "%d queued, the next %s\n", queued, next)
	if capacity < 0 {
		fmt.Fprintln(out, "this system does not report how many fit")
		return true, nil
	}
	if queued != capacity {
		fmt.Fprintf(out, "the listener reported that %d fit: the numbers differ\n", capacity)
		return false, nil
	}
	fmt.Fprintf(out, "the listener reported that %d fit: the numbers agree\n", capacity)
	return true, nil
}

// keptOut reports whether a client failed because the listener's kernel did not
// let it in. Other failures have a cause in the client: for example, it had no free
// descriptor (ulimit -n) or no free port.
func keptOut(err error) bool {
	var call *os.SyscallError
	return timedOut(err) || errors.As(err, &call) && strings.HasPrefix(call.Syscall, "connect") &&
		!errors.Is(err, syscall.EADDRNOTAVAIL)
}

// fate describes what happened to a client that did not get in.
func fate(err error) string {
	if timedOut(err) {
		return "hangs"
	}
	return fmt.Sprintf("fails: %v", err)
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// survivors accepts all queued connections and counts them.
func survivors(ln *acceptq.Listener) (n int, err error) {
	for {
		if err := ln.SetDeadline(time.Now().Add(patience)); err != nil {
			return n, err
		}
		c, err := ln.Accept()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		defer c.Close()
		n++
	}
}
