package acceptq

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/acceptq/acceptq/internal/sys"
)

// A Queue is the accept queue of a listening TCP socket of any process.
//
// In JSON the names are those of the fields in lower case, with "v6Only". An empty Device
// is "", and an unknown number of Stats is null.
type Queue struct {
	// Addr is the local address and port. A link-local address has a zone. An IPv6 socket
	// that is bound to an IPv4-mapped address has the IPv4 address.
	Addr netip.AddrPort `json:"addr"`
	// V6Only reports whether the socket is an IPv6 socket that does not take IPv4 clients.
	V6Only bool `json:"v6Only"`
	// Device is the interface that the socket is bound to, by SO_BINDTODEVICE or by the
	// zone of its address. It is empty if the socket takes clients from all interfaces.
	Device string `json:"device"`
	// Stats has the meanings of [Listener.Stats]. Drops is also known on an MPTCP socket.
	Stats Stats `json:"stats"`
	// UID is the user who made the socket.
	UID uint32 `json:"uid"`
	// Inode is the number of the socket. The links in /proc/PID/fd have it, and it tells the
	// sockets of a SO_REUSEPORT group apart.
	Inode uint64 `json:"inode"`
}

// String returns the address and the numbers in one line.
func (q Queue) String() string {
	device := ""
	if q.Device != "" && q.Addr.Addr().Zone() == "" {
		device = " on " + q.Device
	}
	return fmt.Sprintf("%v%s: %v", q.Addr, device, q.Stats)
}

// Queues returns the accept queue of every TCP socket that listens in the network namespace
// of the calling thread, the fullest first. The sockets may belong to any process. The call
// needs no privilege and changes nothing.
//
// A socket that begins or ends to listen during the call may be missing, and so may another
// member of its SO_REUSEPORT group. If ctx ends, Queues stops early and returns its error.
//
// The call makes two requests to the kernel, however many connections there are. With 1,001
// listeners and 16,000 connections they took 1 ms.
//   - Linux: sock_diag(7), one request for IPv4 and one for IPv6.
//   - Other systems: the error matches [errors.ErrUnsupported]. FreeBSD lists the lengths and
//     the limits in the sysctl net.inet.tcp.pcblist, but no drops. Queues does not read it yet.
func Queues(ctx context.Context) ([]Queue, error) {
	queues, err := []Queue(nil), errNilContext
	if ctx != nil {
		queues, err = listQueues(&sys.Real, ctx)
	}
	if err != nil {
		return nil, &net.OpError{Op: "queues", Net: "tcp", Err: err}
	}
	sortQueues(queues)
	return queues, nil
}

// Group returns the queues of the sockets that listen on the address of l, the fullest
// first: its SO_REUSEPORT group, which may have members in other processes, and l itself.
//
// The error matches [net.ErrClosed] after Close. Otherwise Group is like [Queues], in the
// network namespace of l.
func (l *Listener) Group(ctx context.Context) ([]Queue, error) {
	if !l.ok() {
		return nil, l.opError("group", sys.ErrNotListening)
	}
	queues, err := []Queue(nil), errNilContext
	if ctx != nil {
		queues, err = listGroup(l.intake.Calls, ctx, l)
	}
	if err != nil {
		return nil, l.opError("group", err)
	}
	sortQueues(queues)
	return queues, nil
}

// Waiting lists the connections that wait in q, the longest wait first, as
// [Listener.Waiting] does for a socket of this program. q comes from [Queues], and the caller
// is in the same network namespace.
//
// Waiting cannot notice that q also gets clients of other ports or addresses, by TPROXY or
// by a BPF program of type sk_lookup. Such clients are missing. If the socket does not listen
// any more, the error matches [errors.ErrUnsupported], as it does on systems other than Linux.
func (q Queue) Waiting(ctx context.Context) ([]Waiting, error) {
	all, err := []Waiting(nil), errNilContext
	if ctx != nil {
		all, err = listForeign(&sys.Real, ctx, q)
	}
	if err != nil {
		return nil, &net.OpError{Op: "waiting", Net: "tcp", Addr: net.TCPAddrFromAddrPort(q.Addr), Err: err}
	}
	sortWaiting(all)
	return all, nil
}

// sortQueues sorts by utilization, the fullest first. Queues that are equally full are in
// the order of their addresses, so that two calls return the same order.
func sortQueues(queues []Queue) {
	slices.SortFunc(queues, func(a, b Queue) int {
		fullA, _ := a.Stats.Utilization()
		fullB, _ := b.Stats.Utilization()
		return cmp.Or(cmp.Compare(fullB, fullA), cmp.Compare(b.Stats.Queued, a.Stats.Queued),
			a.Addr.Compare(b.Addr), cmp.Compare(a.Inode, b.Inode))
	})
}
