package acceptq

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// Waiting is a connection that waits in an accept queue.
type Waiting struct {
	// Client is the client's address.
	Client netip.AddrPort
	// Waited is the time since the handshake ended, see [QueueTime]. -1 means unknown.
	Waited time.Duration
	// Received is the number of bytes that the client has sent. -1 means unknown, which
	// is the case before Linux 4.1.
	Received int64
	// Closed reports whether the client has closed the connection, or its sending side.
	// Such a client has probably given up.
	Closed bool
	// Shared reports whether the connection may be in the queue of another socket that
	// listens on the port, see [WithReusePort]. The kernel does not tell which queue has it.
	Shared bool
}

// String describes the connection in one line.
func (w Waiting) String() string {
	var line strings.Builder
	fmt.Fprintf(&line, "%v", w.Client)
	if w.Waited == unknown {
		line.WriteString(" for an unknown time")
	} else {
		fmt.Fprintf(&line, " for %v", w.Waited)
	}
	fmt.Fprintf(&line, ", %v bytes received", count(w.Received))
	if w.Closed {
		line.WriteString(", closed by the client")
	}
	if w.Shared {
		line.WriteString(", perhaps in the queue of another listener")
	}
	return line.String()
}

// Waiting lists the connections that wait for Accept, the longest wait first. It needs
// no privilege and does not affect Accept. If the server is stuck, call it from another
// goroutine.
//
// The list can differ from Queued in [Stats]. A connection that its client has reset
// stays in the queue, but the kernel does not list it. A connection that arrives or
// leaves during the call may be missing. A client of an MPTCP listener may appear once
// for each of its subflows.
//
// Do not call Waiting for each request. The kernel walks the table of all TCP sockets in
// the network namespace, which took 67 ms of CPU time with 198,000 sockets. If ctx ends,
// Waiting stops early and returns its error.
//
// A listener can also get clients of other local ports or addresses, by TPROXY or by a BPF
// program of type sk_lookup. Then Waiting cannot tell which connections are in the queue,
// and returns an error. It finds TPROXY by the socket option IP_TRANSPARENT. It finds
// sk_lookup only after Accept has returned such a client. Before that, such clients are
// missing from the list.
//
// After Close the error matches [net.ErrClosed]. On systems other than Linux, and if Waiting
// cannot tell the connections, it matches [errors.ErrUnsupported]. The source is
// sock_diag(7): connections without an inode.
func (l *Listener) Waiting(ctx context.Context) ([]Waiting, error) {
	if !l.ok() {
		return nil, l.opError("waiting", sys.ErrNotListening)
	}
	return waiting(ctx, []*Listener{l})
}

// Waiting lists the connections that wait in the queues of all shards, see
// [Listener.Waiting]. The kernel does not report the shard of a connection. Shared is
// true only if a socket outside the shards may have the connection.
func (s *Shards) Waiting(ctx context.Context) ([]Waiting, error) {
	if err := s.none("waiting"); err != nil {
		return nil, err
	}
	return waiting(ctx, s.listeners)
}

// waiting lists the queues of listeners, which share one port. The kernel walks its table
// once for all of them.
func waiting(ctx context.Context, listeners []*Listener) ([]Waiting, error) {
	first := listeners[0]
	if ctx == nil {
		return nil, first.opError("waiting", errNilContext)
	}
	all, err := listWaiting(first.intake.Calls, ctx, listeners)
	if err != nil {
		return nil, first.opError("waiting", err)
	}
	sortWaiting(all)
	return all, nil
}

// sortWaiting sorts by the wait, the longest first.
func sortWaiting(all []Waiting) {
	slices.SortFunc(all, func(a, b Waiting) int {
		return cmp.Or(cmp.Compare(b.Waited, a.Waited), a.Client.Compare(b.Client))
	})
}

// Handshakes returns the number of in-flight handshakes that may become connections of l:
// the kernel has answered a SYN, and the final ACK has not come. If there are many and
// [Listener.Accepted] does not rise, that is a sign of a SYN flood.
//
// The kernel does not report the listener of a handshake. So the number includes the
// handshakes of other listeners on the same port and address, such as a SO_REUSEPORT
// group. A handshake that uses a SYN cookie is not listed.
//
// Like [Listener.Waiting], the call makes the kernel walk the table of all TCP sockets in
// the network namespace. If ctx ends, it stops early and returns its error.
//
// The result is -1 if there is an error. After Close the error matches [net.ErrClosed]. On
// systems other than Linux it matches [errors.ErrUnsupported]. The source is sock_diag(7).
func (l *Listener) Handshakes(ctx context.Context) (int, error) {
	if !l.ok() {
		return unknown, l.opError("handshakes", sys.ErrNotListening)
	}
	if ctx == nil {
		return unknown, l.opError("handshakes", errNilContext)
	}
	n, err := countHandshakes(l.intake.Calls, ctx, l)
	if err != nil {
		return unknown, l.opError("handshakes", err)
	}
	return n, nil
}
