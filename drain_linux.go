package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A stop keeps new handshakes from a listening socket while those in flight go on.
// Connections that are made meanwhile inherit it.
type stop struct {
	filter bool // a socket filter drops SYNs
	// Otherwise packets need a TTL of 255, which few systems send. These are the
	// values of IP_MINTTL and IPV6_MINHOPCOUNT before; -1 where the socket has no such
	// option.
	ttl, hops int
}

const (
	maxTTL = 255
	// The initial TTLs in use are 64, 128 and 255. A listener that asks for more than
	// 128 already serves only clients that send 255, and a minimum of 255 stops none.
	mostTTL = 128
)

// dropSYN is a socket filter, which sees a packet from its TCP header on: flags
// are byte 13. A SYN without an ACK is dropped, everything else passes.
var dropSYN = [...]unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13},
	{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: tcpSYN | tcpACK},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: tcpSYN, Jt: 0, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
}

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// stopIntake stops the intake of the listening socket fd, or says why it cannot. A stop
// that is on the socket already, left by a process that was killed or put there by
// another holder, is taken over.
func (sys *system) stopIntake(fd int, in *intake, f *flight) (*stop, error) {
	if s := sys.stopOn(fd); s != nil {
		in.inherited.Store(&inheritance{stop: s})
		return s, nil
	}
	var reasons []error
	former := in.inherited.Load()
	for _, way := range []func(fd int, f *flight) (*stop, error){sys.filterWay, sys.ttlWay} {
		s, err := way(fd, f)
		if err == nil {
			// Noted first: a connection may be made, and accepted, right after.
			in.inherited.Store(&inheritance{stop: s})
			if err = sys.apply(fd, s); err == nil {
				return s, nil
			}
		}
		reasons = append(reasons, err)
	}
	in.inherited.Store(former)
	return nil, join(reasons)
}

// filterWay is the stop by a socket filter, if fd can take it. A filter that is there
// already is the user's, and would be replaced.
func (sys *system) filterWay(fd int, _ *flight) (*stop, error) {
	switch some, _, err := sys.filterOn(fd); {
	case err != nil:
		return nil, os.NewSyscallError("getsockopt", err)
	case some:
		return nil, errors.New("the socket has a filter of its own")
	}
	return &stop{filter: true}, nil
}

// ttlWay is the stop by a minimum TTL, if that stops anyone on fd. It drops the final
// ACK of a SYN cookie, so it does not serve where every handshake is made by one.
func (sys *system) ttlWay(fd int, f *flight) (*stop, error) {
	if f.cookiesOnly {
		return nil, errors.New("a minimum TTL drops the handshakes of SYN cookies")
	}
	ttl, hops := sys.minimumTTL(fd)
	switch most := max(ttl, hops); {
	case most == unknown:
		return nil, fmt.Errorf("a minimum TTL: %w", errors.ErrUnsupported)
	case most > mostTTL:
		return nil, fmt.Errorf("the socket has a minimum TTL of its own, %d", most)
	}
	return &stop{ttl: ttl, hops: hops}, nil
}

// minimumTTL reads IP_MINTTL and IPV6_MINHOPCOUNT of fd; -1 where it has no such option.
func (sys *system) minimumTTL(fd int) (ttl, hops int) {
	read := func(level, name int) int {
		n, err := sys.getsockoptInt(fd, level, name)
		if err != nil {
			return unknown
		}
		return n
	}
	return read(unix.IPPROTO_IP, unix.IP_MINTTL), read(unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT)
}

// apply puts s on fd, or leaves fd as it was.
func (sys *system) apply(fd int, s *stop) error {
	if s.filter {
		return os.NewSyscallError("setsockopt", sys.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]}))
	}
	// The mark comes first and goes last, so that whatever is found between is known
	// to be a drain's.
	err := sys.setMark(fd, 1)
	if err == nil {
		err = sys.setTTL(fd, s, maxTTL, maxTTL)
	}
	if err != nil {
		sys.remove(fd, s)
	}
	return err
}

// setMark marks a minimum TTL as a drain's by SO_RXQ_OVFL, an option that TCP does not
// use. Without it nobody could tell it from one that the user set for GTSM (RFC 5082).
func (sys *system) setMark(fd, value int) error {
	return sys.setInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, value)
}

// stopOn returns the stop that is on fd, a listener or a connection that inherited
// it; nil if there is none. What the minimum TTL was before is not known then, and 0
// is the kernel's default.
func (sys *system) stopOn(fd int) *stop {
	if _, ours, _ := sys.filterOn(fd); ours {
		return &stop{filter: true}
	}
	if on, err := sys.marked(fd); err != nil || !on {
		return nil
	}
	ttl, hops := sys.minimumTTL(fd)
	if max(ttl, hops) != maxTTL {
		return nil
	}
	return &stop{ttl: min(ttl, 0), hops: min(hops, 0)}
}

// filterOn reports whether fd has some filter, and whether that is dropSYN.
func (sys *system) filterOn(fd int) (some, ours bool, err error) {
	var p [len(dropSYN)]unix.SockFilter
	switch n, err := sys.getFilter(fd, p[:]); {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES): // it is longer, or eBPF
		return true, false, nil
	case err != nil:
		return false, false, err
	default:
		return n > 0, n == len(dropSYN) && p == dropSYN, nil
	}
}

// marked reports whether a drain has set, or is setting, a minimum TTL on fd.
func (sys *system) marked(fd int) (bool, error) {
	n, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL)
	return n != 0, err
}

// remove takes s from fd, a listener or a connection that inherited it.
func (sys *system) remove(fd int, s *stop) error {
	if s.filter {
		err := sys.setInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) { // another holder was quicker
			return nil
		}
		return err
	}
	if err := sys.setTTL(fd, s, s.ttl, s.hops); err != nil {
		return err
	}
	return sys.setMark(fd, 0)
}

// setTTL sets those of the two options that the socket has, the second also when
// the first fails.
func (sys *system) setTTL(fd int, s *stop, ttl, hops int) error {
	var v4, v6 error
	if s.ttl != unknown {
		v4 = sys.setInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, ttl)
	}
	if s.hops != unknown {
		v6 = sys.setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, hops)
	}
	return cmp.Or(v4, v6)
}

// lift takes s from the listening socket fd, unless another holder has taken it or has
// put something else in its place. If that cannot be found out it is taken all the same.
func (sys *system) lift(fd int, s *stop) error {
	var replaced bool
	if s.filter {
		some, ours, _ := sys.filterOn(fd)
		replaced = some && !ours
	} else {
		on, err := sys.marked(fd)
		replaced = err == nil && !on && max(sys.minimumTTL(fd)) != maxTTL
	}
	if replaced {
		return nil
	}
	return sys.remove(fd, s)
}

// clean takes from the connection fd what it inherited. With a minimum TTL it would
// hear nothing from its client. s is what its listener was stopped by; what the user
// has set on it is left alone.
func (sys *system) clean(fd int, s *stop) {
	on := sys.stopOn(fd)
	if on == nil {
		return
	}
	if on.filter == s.filter {
		on = s // it knows the former values
	}
	sys.remove(fd, on)
}

// liftLeft takes from the listening socket fd what a drain has left on it, and returns
// what connections in the queue may have inherited from it; nil if there was nothing.
func (sys *system) liftLeft(fd int) (*inheritance, error) {
	s := sys.stopOn(fd)
	if s == nil {
		return nil, nil
	}
	return &inheritance{stop: s, lifted: time.Now()}, sys.remove(fd, s)
}

// duplicated reports whether this process has another descriptor of the socket, as
// tableflip keeps one. If that cannot be found out it is taken to have one.
func (l *Listener) duplicated() bool {
	var own unix.Stat_t
	var operr error
	err := l.raw.Control(func(fd uintptr) { operr = unix.Fstat(int(fd), &own) })
	if err != nil {
		return false // closed, so no stop is left either
	}
	n, err := l.sys.holders(own)
	return operr != nil || err != nil || n > 1
}

// holders counts the descriptors of this process that name the file.
func holders(file unix.Stat_t) (n int, err error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		fd, err := parseSysctl(name)
		if err != nil {
			return 0, err
		}
		var s unix.Stat_t
		if unix.Fstat(fd, &s) == nil && s.Ino == file.Ino && s.Dev == file.Dev {
			n++
		}
	}
	return n, nil
}

// A flight is the handshakes on a port that were unfinished when the intake stopped.
// Their rows do not name a listener, so those of another listener of this port are
// among them. Handshakes that begin later are not.
type flight struct {
	sys      *system
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
	f := &flight{sys: l.sys, until: time.Now().Add(drainFlight), limit: unknown, cookies: unknown}
	addr := l.Addr().(*net.TCPAddr)
	f.port, f.families = addr.Port, families(addr)
	if err := l.raw.Control(func(fd uintptr) { f.where, f.lost = l.sys.namespaceOf(int(fd)) }); err != nil {
		f.lost = err
	}
	if s, err := l.Stats(); err == nil {
		f.limit, f.full = s.Limit, s.Queued >= s.Capacity
	}
	f.ask(func() error {
		f.cookiesOnly = l.sys.ipv4Setting("tcp_syncookies") == 2
		f.cookies = l.sys.tcpCounters()("TCPReqQFullDoCookies")
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
		now, err = f.sys.handshakes(ctx, f.families, f.port)
		cookies = f.sys.tcpCounters()("TCPReqQFullDoCookies")
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
