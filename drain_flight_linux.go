package acceptq

import (
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// A flight is the handshakes on a port that were unfinished when the intake stopped.
// Their rows do not name a listener, so those of another listener of this port are
// among them. Handshakes that begin later are not.
type flight struct {
	kernel   *kernel
	where    namespace
	lost     error // why the listener's namespace cannot be asked
	port     int
	families []uint8
	limit    int   // of one listener: with more handshakes than that the kernel sends SYN cookies
	cookies  int64 // how many it had sent when the drain began
	full     bool  // the accept queue was full then, so clients with cookies may be retrying
	// cookiesOnly says that the kernel answers every SYN with a cookie
	// (net.ipv4.tcp_syncookies is 2), and knows of no handshake in flight.
	cookiesOnly bool

	looked  int                    // how many looks the kernel has answered
	unseen  bool                   // handshakes may be in flight that no look shows
	waiting map[handshake]struct{} // as of the last look
	next    time.Time              // when to ask the kernel again
	pause   time.Duration          // and how long after that: each answer costs it a walk
	until   time.Time
}

func newFlight(l *Listener) *flight {
	f := &flight{kernel: l.kernel, until: time.Now().Add(drainFlight), limit: unknown, cookies: unknown}
	addr := l.Addr().(*net.TCPAddr)
	f.port, f.families = addr.Port, families(addr)
	if err := l.raw.Control(func(fd uintptr) { f.where, f.lost = l.kernel.namespaceOf(int(fd)) }); err != nil {
		f.lost = err
	}
	if s, err := l.Stats(); err == nil {
		f.limit, f.full = s.Limit, s.Queued >= s.Capacity
	}
	f.ask(func() error {
		f.cookiesOnly = l.kernel.ipv4Setting("tcp_syncookies") == 2
		f.cookies = l.kernel.tcpCounters()("TCPReqQFullDoCookies")
		return nil
	})
	return f
}

// families are those that a client of a listener at addr may have.
func families(addr *net.TCPAddr) []uint8 {
	switch {
	case addr.IP.To4() != nil:
		return []uint8{unix.AF_INET}
	case addr.IP.IsUnspecified() || addr.IP == nil: // may be of both
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET6}
}

func (f *flight) close() { f.where.close() }

// ask calls question where the listener is.
func (f *flight) ask(question func() error) error {
	if f.lost != nil {
		return f.lost
	}
	return f.where.in(question)
}

// look asks the kernel which handshakes are left, if it is time to.
func (f *flight) look(ctx context.Context) {
	if f.over() || f.unseen || f.looked > 1 && len(f.waiting) == 0 || time.Now().Before(f.next) {
		return
	}
	var now map[handshake]struct{}
	cookies := int64(unknown)
	err := f.ask(func() (err error) {
		now, err = f.kernel.handshakes(ctx, f.families, f.port)
		cookies = f.kernel.tcpCounters()("TCPReqQFullDoCookies")
		return err
	})
	if ctx.Err() != nil {
		return // the last answer holds
	}
	f.pause = min(2*f.pause+drainLook, 20*drainLook)
	f.next = time.Now().Add(f.pause)
	f.looked++
	switch {
	case err != nil || f.cookiesOnly:
		f.unseen = true
	case f.looked <= 2:
		// Handshakes by SYN cookies have no state. There may be some if the kernel
		// sends cookies now, or has sent some and the accept queue was full.
		f.unseen = f.cookies != unknown && cookies > f.cookies || f.cookies > 0 && f.full ||
			f.limit != unknown && len(now) > f.limit
		// The second look adds those whose SYN another processor was about to take
		// in when the intake stopped.
		f.waiting = now
	default:
		for h := range f.waiting {
			if _, unfinished := now[h]; !unfinished {
				delete(f.waiting, h)
			}
		}
	}
}

// left is the number of handshakes still unfinished; -1 if it cannot be found out, or
// has not been yet.
func (f *flight) left() int {
	if f.unseen || f.looked < 2 {
		return unknown
	}
	return len(f.waiting)
}

// over reports whether they have been waited for long enough.
func (f *flight) over() bool { return time.Now().After(f.until) }
