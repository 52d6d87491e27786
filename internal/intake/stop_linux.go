package intake

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// A Stop keeps new clients from a listening socket, while in-flight handshakes continue.
// Connections that are made in the meantime inherit it.
type Stop struct {
	Filter bool // a socket filter drops SYNs
	// If filter is false, the stop is a minimum TTL that few clients have. ttl and hops
	// are the former values of IP_MINTTL and IPV6_MINHOPCOUNT. -1 means that the socket
	// does not have the option.
	ttl, hops int
}

const (
	MaxTTL = 255
	// Systems use the initial TTLs 64, 128 and 255. A minimum above commonTTL stops the
	// clients with the first two. The stop adds up to MaxTTL with the former value, so that
	// another process can restore that value. It is above commonTTL if the former value is
	// at most mostTTL.
	commonTTL = 128
	mostTTL   = MaxTTL - commonTTL - 1
)

// DropSYN is a socket filter that drops a SYN without an ACK and passes all other
// packets. A socket filter sees a packet from its TCP header on, and byte 13 holds the
// flags.
var DropSYN = [...]unix.SockFilter{
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

// A holder says who has set an option of a socket.
type holder int

const (
	nobody   holder = iota
	ours            // this library, perhaps in another process
	somebody        // the user of the socket
	unclear         // the kernel does not say
)

// A state is what keeps clients from a socket, a listener or a connection that inherited it.
type state struct {
	filter    holder
	filterErr error // why filter is unclear

	minimum   holder
	ttl, hops int   // IP_MINTTL and IPV6_MINHOPCOUNT; -1 if the socket does not have the option
	ttlErr    error // why minimum is unclear
}

// stop returns the stop of this library that is in force, or nil.
func (s state) stop() *Stop {
	switch {
	case s.filter == ours:
		return &Stop{Filter: true}
	case s.minimum == ours && max(s.ttl, s.hops) > commonTTL: // not the mark of a question
		return &Stop{ttl: former(s.ttl), hops: former(s.hops)}
	}
	return nil
}

// former returns the value of an option before a stop, or markListener, changed it to value.
func former(value int) int {
	switch {
	case value > commonTTL:
		return MaxTTL - value
	case value > 2:
		return value - 1
	}
	return min(value, 0)
}

// stateOf reads what keeps clients from the socket fd.
func stateOf(k *sys.Calls, fd int) (s state) {
	s.filter, s.filterErr = filterOf(k, fd)
	s.minimum, s.ttl, s.hops, s.ttlErr = minimumOf(k, fd)
	return s
}

// filterOf reports who has set the socket filter of fd.
func filterOf(k *sys.Calls, fd int) (holder, error) {
	var p [len(DropSYN)]unix.SockFilter
	switch n, err := k.GetFilter(fd, p[:]); {
	case errors.Is(err, unix.EINVAL): // the filter is longer than p, unless its length says otherwise
		if n, lerr := k.GetFilter(fd, nil); lerr == nil && n <= len(p) {
			return unclear, os.NewSyscallError("getsockopt", err)
		}
		return somebody, nil
	case errors.Is(err, unix.EACCES): // eBPF
		return somebody, nil
	case err != nil:
		return unclear, os.NewSyscallError("getsockopt", err)
	case n == 0:
		return nobody, nil
	case n == len(DropSYN) && p == DropSYN:
		return ours, nil
	case n == len(p) && p == [len(DropSYN)]unix.SockFilter{}: // no program ends like that
		return unclear, os.NewSyscallError("getsockopt", unix.EBADMSG)
	}
	return somebody, nil
}

// minimumOf reports who has set the minimum TTL of fd.
func minimumOf(k *sys.Calls, fd int) (_ holder, ttl, hops int, err error) {
	read := func(level, name int) int {
		n, rerr := k.GetInt(fd, level, name)
		switch {
		case rerr == nil:
			return n
		case !errors.Is(rerr, unix.ENOPROTOOPT) && !errors.Is(rerr, unix.EOPNOTSUPP):
			err = rerr // the socket may have the option
		}
		return sys.Unknown
	}
	ttl, hops = read(unix.IPPROTO_IP, unix.IP_MINTTL), read(unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT)
	marked, merr := marked(k, fd)
	switch err := cmp.Or(err, merr); {
	case err != nil:
		return unclear, ttl, hops, err
	case max(ttl, hops) <= 0:
		return nobody, ttl, hops, nil
	case marked:
		return ours, ttl, hops, nil
	}
	return somebody, ttl, hops, nil
}

// setMark marks the minimum TTL of fd as set by this library. The mark is SO_RXQ_OVFL, an
// option that TCP does not use. Without the mark, a minimum TTL that the caller set for
// GTSM (RFC 5082) would look the same.
func setMark(k *sys.Calls, fd, value int) error {
	return k.SetInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, value)
}

// marked reports whether fd has the mark of setMark.
func marked(k *sys.Calls, fd int) (bool, error) {
	n, err := k.GetInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL)
	return n != 0, err
}

// stopFor keeps new clients from the listening socket fd. The error says why it
// cannot. If the socket already has a stop, that stop is used: a process that was killed
// or another holder of the socket has set it. cookies means that every handshake may use
// a SYN cookie.
func stopFor(k *sys.Calls, fd int, in *Intake, cookies bool) (*Stop, error) {
	now := stateOf(k, fd)
	if s := now.stop(); s != nil {
		in.Inherited.Store(&inheritance{Stop: s})
		return s, nil
	}
	former := in.Inherited.Load()
	apply := func(s *Stop, err error) (*Stop, error) {
		if err == nil {
			// This is stored before apply, because a connection may inherit the stop and
			// be accepted right after it.
			in.Inherited.Store(&inheritance{Stop: s})
			err = apply(k, fd, s)
		}
		return s, err
	}
	s, err := apply(now.filterWay())
	if err == nil {
		return s, nil
	}
	s, ttlErr := apply(now.ttlWay(cookies))
	if ttlErr == nil {
		return s, nil
	}
	in.Inherited.Store(former)
	return nil, joined{err, ttlErr}
}

// filterWay returns the stop by a socket filter. It fails if the socket has a filter,
// because that filter belongs to the caller and would be replaced.
func (s state) filterWay() (*Stop, error) {
	switch s.filter {
	case unclear:
		return nil, s.filterErr
	case somebody:
		return nil, errors.New("the socket has a filter of its own")
	}
	return &Stop{Filter: true}, nil
}

// ttlWay returns the stop by a minimum TTL. It fails if a minimum TTL would stop no client
// of the socket, or if the former value could not be restored. It also fails if every
// handshake may use a SYN cookie, because a minimum TTL drops the final ACKs of those.
func (s state) ttlWay(cookies bool) (*Stop, error) {
	if s.minimum == ours { // the mark of a question that is not over
		s.ttl, s.hops = former(s.ttl), former(s.hops)
	}
	most := max(s.ttl, s.hops)
	switch {
	case cookies:
		return nil, errors.New("net.ipv4.tcp_syncookies is or may be 2, and a minimum TTL drops handshakes that use SYN cookies")
	case s.minimum == unclear:
		return nil, s.ttlErr
	case most == sys.Unknown:
		return nil, fmt.Errorf("the socket has no minimum TTL: %w", errors.ErrUnsupported)
	case most > mostTTL:
		return nil, fmt.Errorf("the socket has a minimum TTL of its own, %d", most)
	}
	return &Stop{ttl: s.ttl, hops: s.hops}, nil
}

// apply sets s on fd. If that fails, fd is as before.
func apply(k *sys.Calls, fd int, s *Stop) error {
	if s.Filter {
		return os.NewSyscallError("setsockopt", k.AttachFilter(fd, &unix.SockFprog{Len: uint16(len(DropSYN)), Filter: &DropSYN[0]}))
	}
	return demand(k, fd, s, MaxTTL-s.ttl, MaxTTL-s.hops)
}

// demand sets the minimum TTL of fd, and the mark. The mark is set first and removed last.
// So a minimum TTL that this library has set is always marked. If demand fails, fd is as
// before: s has the former values.
func demand(k *sys.Calls, fd int, s *Stop, ttl, hops int) error {
	err := setMark(k, fd, 1)
	if err == nil {
		err = setTTL(k, fd, s, ttl, hops)
	}
	if err != nil {
		removeStop(k, fd, s)
	}
	return err
}

// removeStop removes s from fd, a listener or a connection that inherited s.
func removeStop(k *sys.Calls, fd int, s *Stop) error {
	if s.Filter {
		err := k.SetInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) { // another holder has removed it
			return nil
		}
		return err
	}
	if err := setTTL(k, fd, s, s.ttl, s.hops); err != nil {
		return err
	}
	return setMark(k, fd, 0)
}

// setTTL sets both options, as far as the socket has them. If the first fails, it still
// sets the second.
func setTTL(k *sys.Calls, fd int, s *Stop, ttl, hops int) error {
	var v4, v6 error
	if s.ttl != sys.Unknown {
		v4 = k.SetInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, ttl)
	}
	if s.hops != sys.Unknown {
		v6 = k.SetInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, hops)
	}
	return cmp.Or(v4, v6)
}

// Lift removes from the socket fd what this library has set, in any process. known is the
// stop of the caller, or nil. It is removed unless the kernel says that somebody else has
// replaced it. lift returns what it has removed, or nil.
func Lift(k *sys.Calls, fd int, known *Stop) (*Stop, error) {
	now := stateOf(k, fd)
	var lifted *Stop
	var filterErr, ttlErr error
	if now.filter == ours || now.filter == unclear && known != nil && known.Filter {
		lifted = &Stop{Filter: true}
		filterErr = removeStop(k, fd, lifted)
	}
	switch {
	case known != nil && !known.Filter && now.minimum != somebody:
		lifted = known
		ttlErr = removeStop(k, fd, known)
	case now.minimum == ours:
		lifted = &Stop{ttl: former(now.ttl), hops: former(now.hops)}
		ttlErr = removeStop(k, fd, lifted)
	}
	return lifted, cmp.Or(filterErr, ttlErr)
}

// stands reports whether a stop is still on the listening socket fd. Another holder of the
// socket may have removed it. If the kernel does not say, stands is true.
func stands(k *sys.Calls, fd int) bool {
	now := stateOf(k, fd)
	return now.stop() != nil || now.filter == unclear || now.minimum == unclear
}

// removeInherited removes from the connection fd what it inherited from its listener. With
// a minimum TTL it would receive nothing from its client. Settings of the caller are not
// changed.
func removeInherited(k *sys.Calls, fd int) { Lift(k, fd, nil) }

// removeMigrated is like removeInherited, for a connection that may come from another member
// of a SO_REUSEPORT group that has closed (net.ipv4.tcp_migrate_req). Only a minimum TTL
// would harm it.
func removeMigrated(k *sys.Calls, c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		if on, err := marked(k, int(fd)); on || err != nil {
			removeInherited(k, int(fd))
		}
	})
}

// MayReusePort reports whether the socket fd has SO_REUSEPORT, or may have it.
func MayReusePort(k *sys.Calls, fd int) bool {
	on, err := k.GetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT)
	return on != 0 || err != nil
}

// markListener makes a listening socket drop the SYNs of a question, unless it drops all
// SYNs. It demands a TTL that is one higher than before, and at least 2. ttl is the TTL of
// SYNs that other members with the same options let in. v4 means that they are IPv4. Connections that are made until
// undo is called inherit the mark.
func markListener(k *sys.Calls, raw syscall.RawConn, in *Intake, v4 bool) (ttl int, undo func(), err error) {
	var set *Stop
	var marked *inheritance
	cerr := raw.Control(func(fd uintptr) {
		now := stateOf(k, int(fd))
		allows := Stop{ttl: now.ttl, hops: now.hops} // the minimum without a drain
		s := now.stop()
		if s != nil && !s.Filter {
			allows = *s
		}
		if ttl = max(allows.hops, 1); v4 {
			ttl = max(allows.ttl, 1)
		}
		switch {
		case s != nil: // it drops all SYNs
			return
		case now.minimum == unclear:
			err = now.ttlErr
			return
		case now.minimum == ours || max(now.ttl, now.hops) >= commonTTL:
			err = fmt.Errorf("the socket has a minimum TTL of its own, %d", max(now.ttl, now.hops))
			return
		}
		set = &allows
		marked = &inheritance{Stop: set}
		in.Inherited.Store(marked)
		if err = demand(k, int(fd), set, max(now.ttl, 1)+1, max(now.hops, 1)+1); err != nil {
			set = nil
		}
	})
	return ttl, func() {
		if set == nil {
			return
		}
		raw.Control(func(fd uintptr) {
			// A drain that could not wait for the end of the question has replaced the mark.
			if s := stateOf(k, int(fd)).stop(); s == nil || s.Filter {
				removeStop(k, int(fd), set)
			}
		})
		in.Inherited.CompareAndSwap(marked, &inheritance{Stop: set, lifted: time.Now()})
	}, cmp.Or(cerr, err)
}

// sendsWith returns the TTL of the packets that a socket sends, or -1.
func sendsWith(k *sys.Calls, raw syscall.RawConn, v4 bool) (ttl int) {
	level, name := unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	if v4 {
		level, name = unix.IPPROTO_IP, unix.IP_TTL
	}
	ttl = sys.Unknown
	raw.Control(func(fd uintptr) {
		if n, err := k.GetInt(int(fd), level, name); err == nil {
			ttl = n
		}
	})
	return ttl
}
