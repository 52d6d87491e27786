package acceptq

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// waiting lists the connections in the queues of listeners. The listeners have the same
// port, family and network namespace.
func (k *kernel) waiting(ctx context.Context, listeners []*Listener) (all []Waiting, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var (
		own    = make(map[uint32]bool) // by inode
		family int
		where  namespace
		lost   error // why the namespace is not known; the calling thread's is used then
		operr  error
	)
	for i, l := range listeners {
		err := l.intake.raw.Control(func(fd uintptr) {
			var s unix.Stat_t
			if operr = os.NewSyscallError("fstat", unix.Fstat(int(fd), &s)); operr != nil {
				return
			}
			own[uint32(s.Ino)] = true
			if i > 0 {
				return
			}
			// A connection has the family of its listener, even if the client of an IPv6
			// socket uses IPv4.
			if family, operr = k.getsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); operr != nil {
				operr = os.NewSyscallError("getsockopt", operr)
				return
			}
			where, _, lost = k.namespaceOf(int(fd))
		})
		if err := cmp.Or(err, operr); err != nil {
			where.close()
			return nil, err
		}
		if err := l.intake.otherPorts(); err != nil {
			where.close()
			return nil, err
		}
	}
	defer where.close()
	port := listeners[0].Addr().(*net.TCPAddr).Port
	err = where.in(func() (err error) {
		all, err = k.queuedOn(ctx, uint8(family), port, own)
		return err
	})
	if errors.Is(err, errNotListed) && lost != nil {
		err = fmt.Errorf("%w; %w", err, lost)
	}
	return all, err
}

// errOtherPorts is the error for a listener whose connections cannot be told apart from
// those of other listeners.
var errOtherPorts = fmt.Errorf("the socket gets clients of other local ports or addresses: %w", errors.ErrUnsupported)

// errNotListed is the error if the kernel does not list the listener itself. An empty list
// of connections would prove nothing then.
var errNotListed = fmt.Errorf("sock_diag does not list the socket: %w", errors.ErrUnsupported)

// queuedStates are the states of a connection that waits for Accept. A fast-open
// connection is in the state tcpSynRecv until its handshake has ended.
const queuedStates = 1<<tcpEstablished | 1<<tcpSynRecv | 1<<tcpCloseWait

// queuedOn lists the connections on a port that wait, or may wait, in the queue of a
// listener whose inode is in own.
func (k *kernel) queuedOn(ctx context.Context, family uint8, port int, own map[uint32]bool) ([]Waiting, error) {
	r := diagRequest{family, uint16(port), queuedStates | 1<<tcpListen, 1 << (diagInfo - 1)}
	rows, err := k.dump(ctx, r, func(r row) bool {
		// The kernel also lists all accepted connections of the port, which may be many.
		// An in-flight handshake has no info.
		return r.state == tcpListen || r.inode == 0 && r.info != nil
	})
	if ended := ctx.Err(); ended != nil {
		return nil, ended
	}
	if err != nil {
		return nil, os.NewSyscallError("sock_diag", err)
	}
	var ours, others, queued []row
	seen := make(map[uint64]bool) // the kernel can list a socket twice while its table changes
	for _, r := range rows {
		switch {
		case r.state == tcpListen && own[r.inode]:
			ours = append(ours, r)
		case r.state == tcpListen:
			others = append(others, r)
		case !seen[r.cookie]:
			seen[r.cookie] = true
			queued = append(queued, r)
		}
	}
	if len(ours) == 0 {
		return nil, errNotListed
	}
	all := make([]Waiting, 0, len(queued))
	for _, r := range queued {
		has := func(l row) bool { return mayHave(l, r) }
		if slices.ContainsFunc(ours, has) {
			all = append(all, waitingOf(r, slices.ContainsFunc(others, has)))
		}
	}
	return all, nil
}

// mayHave reports whether the connection c may be in the queue of the listener l. If two
// listeners match, the kernel picks the closer match. But only one of them may have been
// listening when the client connected, so both are possible.
func mayHave(l, c row) bool {
	return (l.local.Addr().IsUnspecified() || l.local.Addr() == c.local.Addr()) && (l.device == 0 || l.device == c.device)
}

// waitingOf returns the connection of a row.
func waitingOf(r row, shared bool) Waiting {
	w := Waiting{Client: r.client, Waited: unknown, Received: unknown, Closed: r.state == tcpCloseWait, Shared: shared}
	if age, ok := ageIn(r.info); ok {
		w.Waited = age
	}
	if len(r.info) >= infoBytesReceived+8 {
		w.Received = int64(binary.NativeEndian.Uint64(r.info[infoBytesReceived:]))
		if w.Closed { // the kernel counts the FIN too
			w.Received--
		}
		w.Received = max(w.Received, unknown)
	}
	if r.device != 0 && r.client.Addr().IsLinkLocalUnicast() && r.client.Addr().Is6() {
		w.Client = netip.AddrPortFrom(r.client.Addr().WithZone(zone(int(r.device))), r.client.Port())
	}
	return w
}

// zone returns the name of an interface, in the form that package net uses in addresses.
func zone(index int) string {
	if i, err := net.InterfaceByIndex(index); err == nil {
		return i.Name
	}
	return strconv.Itoa(index)
}
