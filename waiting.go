package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Waiting is a connection that waits in an accept queue.
type Waiting struct {
	// Client is the client's address.
	Client netip.AddrPort
	// Waited is how long ago the handshake ended, as [QueueTime] tells it; -1 if
	// unknown.
	Waited time.Duration
	// Received is how many bytes the client has sent; -1 if unknown, which is before
	// Linux 4.1.
	Received int64
	// Closed says that the client has closed the connection, or its sending side. A
	// client that wants an answer rarely does that, so it has probably given up.
	Closed bool
	// Shared says that the connection may be in the queue of another socket that
	// listens on the port, see [WithReusePort]. The kernel does not tell.
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
// no privilege and does not disturb Accept: a server that is stuck can be asked from
// another goroutine.
//
// A connection that its client has reset stays in the queue, but the kernel does not
// list it, so the list can be shorter than Stats.Queued. Connections that come or go
// during the call may be missing. A client of an MPTCP listener may be listed once for
// each of its subflows.
//
// Call it when something is wrong, not for each request: the kernel walks its table of
// all TCP connections of the network namespace, which took 67 ms of CPU time beside
// 198,000 sockets. ctx ends the walk early.
//
// The error matches [net.ErrClosed] after Close, and [errors.ErrUnsupported] on systems
// other than Linux. Source: sock_diag(7), connections without an inode.
func (l *Listener) Waiting(ctx context.Context) ([]Waiting, error) {
	if !l.ok() {
		return nil, l.opError("waiting", errNotListening)
	}
	return waiting(ctx, []*Listener{l})
}

// Waiting lists the connections that wait in the queues of all shards, see
// [Listener.Waiting]. The kernel does not tell which shard a connection belongs to.
// Shared is set only if another socket besides the shards listens on the port.
func (s *Shards) Waiting(ctx context.Context) ([]Waiting, error) {
	if err := s.none("waiting"); err != nil {
		return nil, err
	}
	return waiting(ctx, s.listeners)
}

// waiting lists the queues of listeners, which are of one port, with one walk.
func waiting(ctx context.Context, listeners []*Listener) ([]Waiting, error) {
	first := listeners[0]
	if ctx == nil {
		return nil, first.opError("waiting", errNilContext)
	}
	all, err := first.kernel.waiting(ctx, listeners)
	if err != nil {
		return nil, first.opError("waiting", err)
	}
	slices.SortFunc(all, func(a, b Waiting) int {
		return cmp.Or(cmp.Compare(b.Waited, a.Waited), a.Client.Compare(b.Client))
	})
	return all, nil
}
