package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// listQueues lists the listening sockets of the calling thread's network namespace.
func listQueues(k *sys.Calls, ctx context.Context) (queues []Queue, err error) {
	names := deviceNames{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := eachListener(k, ctx, family, 0, func(r sockdiag.Row) {
			queues = append(queues, queueOf(r, names))
		})
		if err != nil {
			return nil, err
		}
	}
	return queues, nil
}

// listGroup lists the sockets that listen on the address of l.
func listGroup(k *sys.Calls, ctx context.Context, l *Listener) (queues []Queue, err error) {
	var (
		inode  uint32
		family int
		where  netns.Namespace
		lost   error // why the namespace is not known; the calling thread's is used then
		operr  error
	)
	err = l.intake.Raw.Control(func(fd uintptr) {
		var s unix.Stat_t
		if operr = os.NewSyscallError("fstat", unix.Fstat(int(fd), &s)); operr != nil {
			return
		}
		inode = uint32(s.Ino)
		if family, operr = k.GetInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); operr == nil {
			where, _, lost = netns.Of(k, int(fd))
		}
	})
	defer where.Close()
	if err := cmp.Or(err, operr); err != nil {
		return nil, err
	}
	err = where.In(func() error {
		var rows []sockdiag.Row
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		err := eachListener(k, ctx, uint8(family), port, func(r sockdiag.Row) { rows = append(rows, r) })
		if err != nil {
			return err
		}
		own := slices.IndexFunc(rows, func(r sockdiag.Row) bool { return r.Inode == inode })
		if own < 0 {
			return errNotListed
		}
		names := deviceNames{}
		for _, r := range rows {
			if sameAddress(r, rows[own]) {
				queues = append(queues, queueOf(r, names))
			}
		}
		return nil
	})
	if errors.Is(err, errNotListed) && lost != nil {
		err = fmt.Errorf("%w; %w", err, lost)
	}
	return queues, err
}

// listForeign lists the connections that wait in a queue of the calling thread's network
// namespace, whose socket may belong to another process.
func listForeign(k *sys.Calls, ctx context.Context, q Queue) ([]Waiting, error) {
	own := map[uint32]bool{uint32(q.Inode): true}
	// An IPv4 address can also be that of an IPv6 socket, as ::ffff:127.0.0.1.
	err := errNotListed
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if family == unix.AF_INET && !q.Addr.Addr().Is4() {
			continue
		}
		var all []Waiting
		if all, err = queuedOn(k, ctx, family, int(q.Addr.Port()), own); !errors.Is(err, errNotListed) {
			return all, err
		}
	}
	return nil, err
}

// sameAddress reports whether two listeners of one family share an address. The kernel lets
// them do that only if they are a SO_REUSEPORT group.
func sameAddress(a, b sockdiag.Row) bool {
	return a.Local == b.Local && a.Device == b.Device && a.V6Only == b.V6Only
}

// eachListener calls found for each listening socket of a family and port, in the calling
// thread's network namespace. Port 0 selects every port.
func eachListener(k *sys.Calls, ctx context.Context, family uint8, port uint16, found func(sockdiag.Row)) error {
	r := sockdiag.Request{Family: family, Port: port, States: 1 << tcpinfo.Listen, Extensions: 1 << (sockdiag.DiagMemInfo - 1)}
	seen := make(map[uint64]bool) // the kernel can list a socket twice while its table changes
	_, err := sockdiag.Dump(k, ctx, r, func(r sockdiag.Row) bool {
		if r.State == tcpinfo.Listen && !seen[r.Cookie] {
			seen[r.Cookie] = true
			r.Info = nil // valid only during this call
			found(r)
		}
		return false
	})
	if ended := ctx.Err(); ended != nil {
		return ended
	}
	return os.NewSyscallError("sock_diag", err)
}

// queueOf returns the queue of a listener's row.
func queueOf(r sockdiag.Row, names deviceNames) Queue {
	rule := hostRule()
	limit := saturate(int64(r.Wqueue))
	q := Queue{
		Addr:   r.Local,
		V6Only: r.V6Only,
		Device: names.of(r.Device),
		Stats: Stats{
			Queued: saturate(int64(r.Rqueue)), Incomplete: unknown, Limit: limit, Capacity: rule.capacity(limit), Drops: r.Drops,
		},
		UID:   r.UID,
		Inode: uint64(r.Inode),
	}
	if addr := q.Addr.Addr(); q.Device != "" && addr.Is6() && addr.IsLinkLocalUnicast() {
		q.Addr = netip.AddrPortFrom(addr.WithZone(q.Device), q.Addr.Port())
	}
	return q
}

// deviceNames remembers the names of interfaces by their index, for one call.
type deviceNames map[uint32]string

// of returns the name of an interface. The index 0 means that there is none.
func (names deviceNames) of(index uint32) string {
	if index == 0 {
		return ""
	}
	name, known := names[index]
	if !known {
		name = zone(int(index))
		names[index] = name
	}
	return name
}
