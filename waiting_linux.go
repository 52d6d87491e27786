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

// waiting lists the connections in the queues of listeners. All of them have the same
// port, family and network namespace.
func (k *kernel) waiting(ctx context.Context, listeners []*Listener) (all []Waiting, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var (
		own    = make(map[uint32]bool) // by inode
		family int
		where  namespace
		lost   error // why its namespace is not known; then the caller's is asked
		operr  error
	)
	for i, l := range listeners {
		err := l.raw.Control(func(fd uintptr) {
			var s unix.Stat_t
			if operr = os.NewSyscallError("fstat", unix.Fstat(int(fd), &s)); operr != nil {
				return
			}
			own[uint32(s.Ino)] = true
			if i > 0 {
				return
			}
			// A connection has the family of its listener, also if the client of an
			// IPv6 socket speaks IPv4.
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

// errNotListed is the error where the kernel does not list the listener itself, so that
// an empty list would prove nothing.
var errNotListed = fmt.Errorf("sock_diag does not list the socket: %w", errors.ErrUnsupported)

// queuedStates are those of a connection that waits for Accept. A fast-open
// connection is in the second until its handshake has ended.
const queuedStates = 1<<tcpEstablished | 1<<tcpSynRecv | 1<<tcpCloseWait

// queuedOn lists the connections on a port that wait in the queue of a listener whose
// inode is in own, or may do so.
func (k *kernel) queuedOn(ctx context.Context, family uint8, port int, own map[uint32]bool) ([]Waiting, error) {
	request := diagRequestWith(family, port, queuedStates|1<<tcpListen, 1<<(diagInfo-1))
	raw, err := k.diagSome(ctx, request, func(p []byte) bool {
		// All accepted connections of the port are listed too, and may be many.
		return len(p) < diagMsgSize || p[diagState] == tcpListen || binary.NativeEndian.Uint32(p[diagInode:]) == 0
	})
	if ended := ctx.Err(); ended != nil {
		return nil, ended
	}
	if err != nil {
		return nil, os.NewSyscallError("sock_diag", err)
	}
	var ours, others, queued []diagRow
	seen := make(map[uint64]bool) // while the table changes a socket can be listed twice
	for _, p := range raw {
		row, err := parseRow(p)
		switch {
		case err != nil:
			return nil, os.NewSyscallError("sock_diag", err)
		case row.state == tcpListen && own[row.inode]:
			ours = append(ours, row)
		case row.state == tcpListen:
			others = append(others, row)
		case row.info == nil: // a handshake in flight
		case !seen[row.cookie]:
			seen[row.cookie] = true
			queued = append(queued, row)
		}
	}
	if len(ours) == 0 {
		return nil, errNotListed
	}
	all := make([]Waiting, 0, len(queued))
	for _, row := range queued {
		mayHave := func(l diagRow) bool { return l.mayHave(row) }
		if slices.ContainsFunc(ours, mayHave) {
			all = append(all, waitingOf(row, slices.ContainsFunc(others, mayHave)))
		}
	}
	return all, nil
}

// mayHave says whether a connection can have come in through the listener l. Of two
// listeners that could take it the kernel picks the closer match, but it did so when
// the client came: then the other may have been alone.
func (l diagRow) mayHave(c diagRow) bool {
	return (l.local.Addr().IsUnspecified() || l.local.Addr() == c.local.Addr()) && (l.iface == 0 || l.iface == c.iface)
}

// waitingOf describes the connection of a row.
func waitingOf(row diagRow, shared bool) Waiting {
	w := Waiting{Client: row.client, Waited: unknown, Received: unknown, Closed: row.state == tcpCloseWait, Shared: shared}
	if age, ok := ageIn(row.info); ok {
		w.Waited = age
	}
	if len(row.info) >= infoBytesReceived+8 {
		w.Received = int64(binary.NativeEndian.Uint64(row.info[infoBytesReceived:]))
		if w.Closed { // the kernel counts the FIN too
			w.Received--
		}
		w.Received = max(w.Received, unknown)
	}
	if row.iface != 0 && row.client.Addr().IsLinkLocalUnicast() && row.client.Addr().Is6() {
		w.Client = netip.AddrPortFrom(row.client.Addr().WithZone(zone(int(row.iface))), row.client.Port())
	}
	return w
}

// zone is the name of an interface, as net has it in an address.
func zone(index int) string {
	if i, err := net.InterfaceByIndex(index); err == nil {
		return i.Name
	}
	return strconv.Itoa(index)
}
