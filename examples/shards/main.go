//go:build !plan9

// Command shards shows how many clients a stalled server can keep. It listens with
// several shards on one port, lets clients connect while the server does not accept, and
// prints how full each queue is. Then it serves all queued clients.
//
// It exits with status 1 if a queued client was lost.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

const (
	// patience is how long a client waits for an answer: a kernel whose queue is full
	// does not answer.
	patience = 500 * time.Millisecond
	// service is how long a client waits for the server after the server has resumed.
	service = 20 * time.Second
	// atOnce is the maximum number of clients that connect at the same time.
	atOnce = 200
)

func main() {
	n := flag.Int("n", 16, "number of shards")
	backlog := flag.Int("backlog", 128, "backlog to request for each shard, in connections")
	clients := flag.Int("clients", 1000, "number of clients that connect")
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		misused("unexpected argument %q", flag.Arg(0))
	case *n < 1:
		misused("-n %d: it must be 1 or more", *n)
	case *clients < 1:
		misused("-clients %d: it must be 1 or more", *clients)
	}
	if err := run(os.Stdout, *addr, *n, *backlog, *clients); err != nil {
		fmt.Fprintln(os.Stderr, "shards:", err)
		os.Exit(1)
	}
}

// misused reports wrong use in one line and ends the program.
func misused(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "shards:", fmt.Sprintf(format, args...))
	os.Exit(2)
}

func run(w io.Writer, addr string, n, backlog, clients int) error {
	out := bufio.NewWriter(w) // it keeps the first error for Flush
	defer out.Flush()         // also the output before an error
	_, err := stall(out, addr, n, backlog, clients)
	return err
}

// An outcome says what happened to the clients of one stalled server.
type outcome struct {
	clients int
	in      int             // the clients that the kernel queued for the server
	queues  []acceptq.Stats // of each shard, before the server resumed
	sum     acceptq.Stats
}

// stall listens, lets clients connect to a server that does not accept, and then
// resumes the server.
func stall(out *bufio.Writer, addr string, n, backlog, clients int) (outcome, error) {
	shards, err := acceptq.ListenTCPShards(addr, n, acceptq.WithBacklog(backlog))
	if err != nil {
		return outcome{}, err
	}
	defer shards.Close()
	for l := range shards.All() {
		fmt.Fprintf(out, "%d %s on %v; %v\n", n, plural(n, "shard"), shards.Addr(), l.Backlog())
		break // the other shards have the same backlog
	}

	fmt.Fprintf(out, "the server is stalled; %d %s connect\n", clients, plural(clients, "client"))
	if err := out.Flush(); err != nil {
		return outcome{}, err
	}
	conns, err := connect(shards.Addr(), clients)
	all := conns
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	if err != nil {
		return outcome{}, err
	}
	o := outcome{clients: clients}
	if o.queues, o.sum, err = look(shards, len(conns)); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return o, err
	}
	conns = stillIn(conns) // FreeBSD resets the excess connections after the handshake
	o.in = len(conns)
	if err == nil {
		for i, q := range o.queues {
			fmt.Fprintf(out, "%5d %s %s of %d\n", i+1, bar(q), length(q), q.Capacity)
		}
	}
	fmt.Fprintf(out, "%d of %d got in", o.in, clients)
	if o.in < clients {
		fmt.Fprintf(out, ", %d did not", clients-o.in)
	}
	if o.sum.Drops >= 0 {
		fmt.Fprintf(out, "; drops %d", o.sum.Drops)
	}
	fmt.Fprintln(out)

	served, err := serve(shards, conns)
	if err != nil {
		return o, err
	}
	if served < o.in {
		return o, fmt.Errorf("%d of %d queued clients were lost", o.in-served, o.in)
	}
	fmt.Fprintf(out, "the server resumes: %d served, none lost\n", served)
	return o, out.Flush()
}

// connect connects clients and returns the connections. It returns an error if a client
// failed for another reason than a full queue.
func connect(addr net.Addr, clients int) (conns []net.Conn, err error) {
	var mu sync.Mutex
	each(clients, func(i int) {
		c, cerr := net.DialTimeout(addr.Network(), addr.String(), patience)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case cerr == nil:
			conns = append(conns, c)
		case !keptOut(cerr) && err == nil:
			err = fmt.Errorf("client %d of %d: %w", i+1, clients, cerr)
		}
	})
	return conns, err
}

// keptOut reports whether a client failed because the listener's kernel did not
// let it in. Other failures have a cause in the client: for example, it had no free
// descriptor (ulimit -n) or no free port.
func keptOut(err error) bool {
	var (
		timeout net.Error
		call    *os.SyscallError
	)
	return errors.As(err, &timeout) && timeout.Timeout() ||
		errors.As(err, &call) && strings.HasPrefix(call.Syscall, "connect") && !errors.Is(err, syscall.EADDRNOTAVAIL)
}

// each calls f n times, with a maximum of atOnce calls at the same time.
func each(n int, f func(i int)) {
	var wait sync.WaitGroup
	room := make(chan struct{}, atOnce)
	for i := range n {
		room <- struct{}{}
		wait.Go(func() {
			f(i)
			<-room
		})
	}
	wait.Wait()
}

// look waits until all connected clients are in the queues, or until patience has
// passed. Then it reads the queues. A client is connected a moment before its connection
// enters a queue.
func look(shards *acceptq.Shards, connected int) (queues []acceptq.Stats, sum acceptq.Stats, err error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		if sum, err = shards.Stats(); err != nil || sum.Queued >= connected || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return nil, sum, err
	}
	for l := range shards.All() {
		q, err := l.Stats()
		if err != nil {
			return nil, sum, err
		}
		queues = append(queues, q)
	}
	return queues, sum, nil
}

// stillIn returns the connections that have not been reset. The server is stalled, so
// it has sent no data on them.
func stillIn(conns []net.Conn) (in []net.Conn) {
	var mu sync.Mutex
	each(len(conns), func(i int) {
		conns[i].SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := conns[i].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		in = append(in, conns[i])
	})
	return in
}

// length formats the length of a queue. DragonFly does not report a long one.
func length(q acceptq.Stats) string {
	if q.Queued < 0 {
		return "unknown"
	}
	return fmt.Sprint(q.Queued)
}

// serve resumes the server, which echoes one byte on each connection. It returns the
// number of connections that got their byte. The error is that of a server that stopped
// too early.
func serve(shards *acceptq.Shards, conns []net.Conn) (served int, err error) {
	done := make(chan error, 1)
	go func() { done <- shards.Serve(echo) }()
	var mu sync.Mutex
	each(len(conns), func(i int) {
		if ask(conns[i]) == nil {
			mu.Lock()
			defer mu.Unlock()
			served++
		}
	})
	shards.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		return served, err
	}
	return served, nil
}

func echo(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(service))
			io.CopyN(c, c, 1)
		}()
	}
}

func ask(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(service)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{'?'}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// bar draws how full a queue is.
func bar(q acceptq.Stats) string {
	const width = 40
	part, _ := q.Utilization()
	full := min(int(part*width+0.5), width)
	return strings.Repeat("█", full) + strings.Repeat("·", width-full)
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}
