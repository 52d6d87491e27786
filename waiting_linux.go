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

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// listWaiting lists the connections in the queues of listeners. The listeners have the same
// port, family and network namespace.
func listWaiting(k *sys.Calls, ctx context.Context, listeners []*Listener) (all []Waiting, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var (
		own    = make(map[uint32]bool) // by inode
		family int
		where  netns.Namespace
		lost   error // why the namespace is not known; the calling thread's is used then
		operr  error
	)
	for i, l := range listeners {
		err := l.intake.Raw.Control(func(fd uintptr) {
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
			if family, operr = k.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); operr != nil {
				operr = os.NewSyscallError("getsockopt", operr)
				return
			}
			where, _, lost = netns.Of(k, int(fd))
		})
		if err := cmp.Or(err, operr); err != nil {
			where.Close()
			return nil, err
		}
		if err := l.intake.OtherPorts(); err != nil {
			where.Close()
			return nil, err
		}
	}
	defer where.Close()
	port := listeners[0].Addr().(*net.TCPAddr).Port
	err = where.In(func() (err error) {
		all, err = queuedOn(k, ctx, uint8(family), port, own)
		return err
	})
	if errors.Is(err, errNotListed) && lost != nil {
		err = fmt.Errorf("%w; %w", err, lost)
	}
	return all, err
}

// errNotListed is the error if the kernel does not list the listener itself. An empty list
// of connections would prove nothing then.
var errNotListed = fmt.Errorf("sock_diag does not list the socket: %w", errors.ErrUnsupported)

// queuedStates are the states of a connection that waits for Accept. A fast-open
// connection is in the state tcpinfo.SynRecv until its handshake has ended.
const queuedStates = 1<<tcpinfo.Established | 1<<tcpinfo.SynRecv | 1<<tcpinfo.CloseWait

// queuedOn lists the connections on a port that wait, or may wait, in the queue of a
// listener whose inode is in own.
func queuedOn(k *sys.Calls, ctx context.Context, family uint8, port int, own map[uint32]bool) ([]Waiting, error) {
	r := sockdiag.Request{Family: family, Port: uint16(port), States: queuedStates | 1<<tcpinfo.Listen, Extensions: 1 << (sockdiag.DiagInfo - 1)}
	rows, err := sockdiag.Dump(k, ctx, r, func(r sockdiag.Row) bool {
		// The kernel also lists all accepted connections of the port, which may be many.
		// An in-flight handshake has no info.
		return r.State == tcpinfo.Listen || r.Inode == 0 && r.Info != nil
	})
	if ended := ctx.Err(); ended != nil {
		return nil, ended
	}
	if err != nil {
		return nil, os.NewSyscallError("sock_diag", err)
	}
	var ours, others, queued []sockdiag.Row
	seen := make(map[uint64]bool) // the kernel can list a socket twice while its table changes
	for _, r := range rows {
		switch {
		case r.State == tcpinfo.Listen && own[r.Inode]:
			ours = append(ours, r)
		case r.State == tcpinfo.Listen:
			others = append(others, r)
		case !seen[r.Cookie]:
			seen[r.Cookie] = true
			queued = append(queued, r)
		}
	}
	if len(ours) == 0 {
		return nil, errNotListed
	}
	all := make([]Waiting, 0, len(queued))
	for _, r := range queued {
		has := func(l sockdiag.Row) bool { return mayHave(l, r) }
		if slices.ContainsFunc(ours, has) {
			all = append(all, waitingOf(r, slices.ContainsFunc(others, has)))
		}
	}
	return all, nil
}

// mayHave reports whether the connection c may be in the queue of the listener l. If two
// listeners match, the kernel picks the closer match. But only one of them may have been
// listening when the client connected, so both are possible.
func mayHave(l, c sockdiag.Row) bool {
	return (l.Local.Addr().IsUnspecified() || l.Local.Addr() == c.Local.Addr()) && (l.Device == 0 || l.Device == c.Device)
}

// waitingOf returns the connection of a row.
func waitingOf(r sockdiag.Row, shared bool) Waiting {
	w := Waiting{Client: r.Client, Waited: unknown, Received: unknown, Closed: r.State == tcpinfo.CloseWait, Shared: shared}
	if age, ok := tcpinfo.Age(r.Info); ok {
		w.Waited = age
	}
	if len(r.Info) >= tcpinfo.BytesReceived+8 {
		w.Received = int64(binary.NativeEndian.Uint64(r.Info[tcpinfo.BytesReceived:]))
		if w.Closed { // the kernel counts the FIN too
			w.Received--
		}
		w.Received = max(w.Received, unknown)
	}
	if r.Device != 0 && r.Client.Addr().IsLinkLocalUnicast() && r.Client.Addr().Is6() {
		w.Client = netip.AddrPortFrom(r.Client.Addr().WithZone(zone(int(r.Device))), r.Client.Port())
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

// countHandshakes counts the in-flight handshakes on the port and address of l.
func countHandshakes(k *sys.Calls, ctx context.Context, l *Listener) (n int, err error) {
	var (
		where  netns.Namespace
		domain int
		operr  error
	)
	err = l.intake.Raw.Control(func(fd uintptr) {
		if domain, operr = k.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); operr != nil {
			operr = os.NewSyscallError("getsockopt", operr)
			return
		}
		where, _, operr = netns.Of(k, int(fd))
	})
	defer where.Close()
	if err := cmp.Or(err, operr); err != nil {
		return unknown, err
	}
	// The handshake of an IPv4 client has the family AF_INET, even if the listener has not.
	families := []uint8{unix.AF_INET}
	if domain == unix.AF_INET6 {
		families = append(families, unix.AF_INET6)
	}
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	local := addr.Addr().Unmap().WithZone("")
	err = where.In(func() error {
		for _, family := range families {
			r := sockdiag.Request{Family: family, Port: addr.Port(), States: 1<<tcpinfo.SynRecv | 1<<tcpinfo.NewSynRecv}
			_, err := sockdiag.Dump(k, ctx, r, func(r sockdiag.Row) bool {
				if local.IsUnspecified() || local == r.Local.Addr() {
					n++
				}
				return false // so that a row needs no memory
			})
			if err != nil {
				return os.NewSyscallError("sock_diag", err)
			}
		}
		return nil
	})
	return n, cmp.Or(ctx.Err(), err)
}
