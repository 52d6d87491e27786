package intake

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// A flight holds the handshakes of listeners that were in flight when their drain began.
// The kernel does not report the listener of a handshake. So the flight includes those of
// other listeners on the same address and port.
type flight struct {
	calls     *sys.Calls
	where     netns.Namespace
	lost      error // why the listeners' namespace cannot be used
	port      uint16
	families  []uint8
	addresses []netip.Addr // of the listeners; nil if clients of any address may reach them
	limit     int          // the sum over all listeners; with more handshakes the kernel sends SYN cookies
	cookies   int64        // how many SYN cookies the kernel had sent when the drain began
	setting   int          // net.ipv4.tcp_syncookies

	looked  int                            // how many requests the kernel has answered
	unseen  bool                           // there may be in-flight handshakes that the kernel does not list
	waiting map[sockdiag.SocketID]struct{} // the handshakes of the last answer
	next    time.Time                      // when to ask the kernel again
	pause   time.Duration                  // the time between two requests, which are expensive
	until   time.Time
}

// NewFlight returns a flight for listeners that share one port.
func NewFlight(ctx context.Context, drainings []*Draining) *flight {
	l := drainings[0].L
	f := &flight{calls: l.Calls, until: time.Now().Add(DrainFlight), cookies: sys.Unknown, setting: sys.Unknown}
	addr := l.TCP.Addr().(*net.TCPAddr)
	f.port, f.families = uint16(addr.Port), Families(addr)
	f.where, f.lost = namespaceOf(ctx, l)
	for _, d := range drainings {
		s, err := d.L.queue()
		if err != nil {
			s = NoQueue
		}
		f.limit = sum(f.limit, s.Limit)
		f.unseen = f.unseen || d.L.ServesOtherPorts()
		f.addresses = append(f.addresses, d.L.TCP.Addr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone(""))
	}
	if slices.ContainsFunc(f.addresses, func(a netip.Addr) bool { return !a.IsValid() || a.IsUnspecified() }) {
		f.addresses = nil
	}
	f.ask(func() error {
		f.setting = l.Calls.IPv4Setting("tcp_syncookies")
		f.cookies = f.sentCookies()
		return nil
	})
	// A handshake that uses a SYN cookie leaves no trace. The counter does not say when
	// the kernel sent them, so some may have been sent a moment ago.
	f.unseen = f.unseen || f.mayUseCookies() || f.cookies != 0
	return f
}

// sentCookies returns how many SYN cookies the kernel has sent.
func (f *flight) sentCookies() int64 { return f.calls.TCPCounters()("SyncookiesSent") }

// mayUseCookies reports whether the kernel answers every SYN with a cookie, or may do so:
// net.ipv4.tcp_syncookies is 2, or cannot be read and the kernel has sent cookies.
func (f *flight) mayUseCookies() bool {
	return f.setting == 2 || f.setting == sys.Unknown && f.cookies != 0
}

// namespaceOf returns the network namespace of l. Some kernels cannot compare namespaces.
// There it is the namespace of the calling thread, if l is listed in it.
func namespaceOf(ctx context.Context, l *Intake) (ns netns.Namespace, err error) {
	var compared bool
	cerr := l.Raw.Control(func(fd uintptr) { ns, compared, err = netns.Of(l.Calls, int(fd)) })
	if err := cmp.Or(cerr, err); err != nil || compared {
		return ns, err
	}
	inode, err := inodeOf(l)
	if err == nil {
		addr := l.TCP.Addr().(*net.TCPAddr)
		_, err = groupRows(l.Calls, ctx, familyOf(addr), uint16(addr.Port), uint32(inode))
	}
	return ns, err
}

// familyOf returns the address family of a listener at addr.
func familyOf(addr *net.TCPAddr) uint8 {
	if addr.IP.To4() != nil {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Families returns the address families that clients of a listener at addr may have.
func Families(addr *net.TCPAddr) []uint8 {
	switch {
	case len(addr.IP) == net.IPv4len:
		return []uint8{unix.AF_INET}
	case addr.IP.To4() != nil || addr.IP.IsUnspecified() || addr.IP == nil: // possibly both
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET6}
}

func (f *flight) close() { f.where.Close() }

// ask calls question in the network namespace of the listener.
func (f *flight) ask(question func() error) error {
	if f.lost != nil {
		return f.lost
	}
	return f.where.In(question)
}

// drainDump is like sockdiag.Dump. It stops after DrainFlight, because a drain does not wait longer
// for in-flight handshakes.
func drainDump(k *sys.Calls, ctx context.Context, r sockdiag.Request, keep func(sockdiag.Row) bool) ([]sockdiag.Row, error) {
	ctx, cancel := context.WithTimeout(ctx, DrainFlight)
	defer cancel()
	return sockdiag.Dump(k, ctx, r, keep)
}

// Handshakes returns the in-flight handshakes that may belong to the listeners, in the
// calling thread's network namespace.
func (f *flight) Handshakes(ctx context.Context) (map[sockdiag.SocketID]struct{}, error) {
	found := make(map[sockdiag.SocketID]struct{})
	for _, family := range f.families {
		r := sockdiag.Request{Family: family, Port: f.port, States: 1<<tcpinfo.SynRecv | 1<<tcpinfo.NewSynRecv}
		_, err := drainDump(f.calls, ctx, r, func(r sockdiag.Row) bool {
			if f.addresses == nil || slices.Contains(f.addresses, r.Local.Addr()) {
				found[r.SocketID] = struct{}{}
			}
			return false
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// look asks the kernel which handshakes are left, unless it has asked recently.
func (f *flight) look(ctx context.Context) {
	if f.unseen || f.looked > 1 && len(f.waiting) == 0 || time.Now().Before(f.next) {
		return
	}
	var now map[sockdiag.SocketID]struct{}
	cookies := int64(sys.Unknown)
	err := f.ask(func() (err error) {
		now, err = f.Handshakes(ctx)
		cookies = f.sentCookies()
		return err
	})
	if ctx.Err() != nil {
		return // keep the last answer
	}
	f.pause = min(2*f.pause+DrainLook, 20*DrainLook)
	f.next = time.Now().Add(f.pause)
	f.looked++
	switch {
	case err != nil:
		f.unseen = true
	case f.looked <= 2:
		// The kernel does not list handshakes that use SYN cookies.
		f.unseen = cookies != f.cookies || f.limit != sys.Unknown && len(now) > f.limit
		// The second answer includes handshakes whose SYN another processor was
		// processing when the socket began to drop SYNs.
		f.waiting = now
	default:
		for h := range f.waiting {
			if _, unfinished := now[h]; !unfinished {
				delete(f.waiting, h)
			}
		}
	}
}

// left returns the number of unfinished handshakes. It returns -1 if the number cannot be
// determined or is not known yet.
func (f *flight) left() int {
	if f.unseen || f.looked < 2 {
		return sys.Unknown
	}
	return len(f.waiting)
}

// extend starts the time limit again. It is called while an accept queue is full, because
// handshakes cannot finish then.
func (f *flight) extend() { f.until = time.Now().Add(DrainFlight) }

// over reports whether the time limit has passed.
func (f *flight) over() bool { return time.Now().After(f.until) }

// ServesOtherPorts reports whether l gets clients of other local ports or addresses than
// its own, or may get them.
func (l *Intake) ServesOtherPorts() bool { return l.OtherPorts() != nil }

// OtherPorts returns an error if l gets clients of other local ports or addresses, or may
// get them. sock_diag lists these clients under the port that they have connected to. They
// come from TPROXY, which needs IP_TRANSPARENT (ip(7)), or from a BPF program of type
// sk_lookup, which shows when Accept has returned such a client.
func (l *Intake) OtherPorts() (err error) {
	if l.Elsewhere.Load() {
		return errOtherPorts
	}
	l.Raw.Control(func(fd uintptr) { // fails on a closed listener, which has no clients
		err = cmp.Or(opaque(l.Calls, int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT),
			opaque(l.Calls, int(fd), unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT))
	})
	return err
}

// opaque returns an error if fd has an option for transparent proxies, or may have it. Only
// ENOPROTOOPT and EOPNOTSUPP mean that the socket cannot have it.
func opaque(k *sys.Calls, fd, level, name int) error {
	switch n, err := k.GetInt(fd, level, name); {
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.EOPNOTSUPP):
		return nil
	case err != nil:
		return fmt.Errorf("whether the socket gets clients of other local ports is unknown: %w: %w", errors.ErrUnsupported, err)
	case n != 0:
		return errOtherPorts
	}
	return nil
}

// errOtherPorts is the error for a listener whose connections cannot be told apart from
// those of other listeners.
var errOtherPorts = fmt.Errorf("the socket gets clients of other local ports or addresses: %w", errors.ErrUnsupported)
