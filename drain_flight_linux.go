package acceptq

import (
	"cmp"
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// A flight holds the handshakes on a port that were in flight when the drain began. The
// kernel does not report the listener of a handshake. So the flight includes those of
// other listeners on the port.
type flight struct {
	kernel   *kernel
	where    namespace
	lost     error // why the listener's namespace cannot be used
	port     int
	families []uint8
	limit    int   // the sum over all listeners; with more handshakes the kernel sends SYN cookies
	cookies  int64 // how many SYN cookies the kernel had sent when the drain began
	full     bool  // an accept queue was full then, so clients with cookies may be retrying
	// cookiesOnly means that the kernel answers every SYN with a cookie
	// (net.ipv4.tcp_syncookies is 2), and therefore lists no in-flight handshake.
	cookiesOnly bool

	looked  int                   // how many requests the kernel has answered
	unseen  bool                  // there may be in-flight handshakes that the kernel does not list
	waiting map[socketID]struct{} // the handshakes of the last answer
	next    time.Time             // when to ask the kernel again
	pause   time.Duration         // the time between two requests, which are expensive
	until   time.Time
}

// newFlight returns a flight for listeners that share one port.
func newFlight(ctx context.Context, listeners []*Listener) *flight {
	l := listeners[0]
	f := &flight{kernel: l.kernel, until: time.Now().Add(drainFlight), cookies: unknown}
	addr := l.Addr().(*net.TCPAddr)
	f.port, f.families = addr.Port, families(addr)
	f.where, f.lost = l.namespace(ctx)
	for _, l := range listeners {
		s, err := l.Stats()
		if err != nil {
			s = noStats
		}
		f.limit = sum(f.limit, s.Limit)
		f.full = f.full || s.Queued >= s.Capacity
	}
	f.ask(func() error {
		f.cookiesOnly = l.kernel.ipv4Setting("tcp_syncookies") == 2
		f.cookies = l.kernel.tcpCounters()("TCPReqQFullDoCookies")
		return nil
	})
	return f
}

// namespace returns the network namespace of l. Some kernels cannot compare namespaces.
// There it is the namespace of the calling thread, if l is listed in it.
func (l *Listener) namespace(ctx context.Context) (ns namespace, err error) {
	var compared bool
	cerr := l.raw.Control(func(fd uintptr) { ns, compared, err = l.kernel.namespaceOf(int(fd)) })
	if err := cmp.Or(cerr, err); err != nil || compared {
		return ns, err
	}
	inode, err := l.inode()
	if err == nil {
		_, err = l.kernel.groupOf(ctx, l, uint32(inode))
	}
	return ns, err
}

// families returns the address families that clients of a listener at addr may have.
func families(addr *net.TCPAddr) []uint8 {
	switch {
	case len(addr.IP) == net.IPv4len:
		return []uint8{unix.AF_INET}
	case addr.IP.To4() != nil || addr.IP.IsUnspecified() || addr.IP == nil: // possibly both
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET6}
}

func (f *flight) close() { f.where.close() }

// ask calls question in the network namespace of the listener.
func (f *flight) ask(question func() error) error {
	if f.lost != nil {
		return f.lost
	}
	return f.where.in(question)
}

// look asks the kernel which handshakes are left, unless it has asked recently.
func (f *flight) look(ctx context.Context) {
	if f.unseen || f.looked > 1 && len(f.waiting) == 0 || time.Now().Before(f.next) {
		return
	}
	var now map[socketID]struct{}
	cookies := int64(unknown)
	err := f.ask(func() (err error) {
		now, err = f.kernel.handshakes(ctx, f.families, f.port)
		cookies = f.kernel.tcpCounters()("TCPReqQFullDoCookies")
		return err
	})
	if ctx.Err() != nil {
		return // keep the last answer
	}
	f.pause = min(2*f.pause+drainLook, 20*drainLook)
	f.next = time.Now().Add(f.pause)
	f.looked++
	switch {
	case err != nil || f.cookiesOnly:
		f.unseen = true
	case f.looked <= 2:
		// The kernel does not list handshakes that use SYN cookies. There may be some
		// if it sends cookies now, or if it has sent some and the accept queue was full.
		f.unseen = f.cookies != unknown && cookies > f.cookies || f.cookies > 0 && f.full ||
			f.limit != unknown && len(now) > f.limit
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
		return unknown
	}
	return len(f.waiting)
}

// extend starts the time limit again. It is called while an accept queue is full, because
// handshakes cannot finish then.
func (f *flight) extend() { f.until = time.Now().Add(drainFlight) }

// over reports whether the time limit has passed.
func (f *flight) over() bool { return time.Now().After(f.until) }
