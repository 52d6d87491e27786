package acceptq

import (
	"cmp"
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
func (k *kernel) stopIntake(fd int, in *intake, f *flight) (*stop, error) {
	if s := k.stopOn(fd); s != nil {
		in.inherited.Store(&inheritance{stop: s})
		return s, nil
	}
	var reasons []error
	former := in.inherited.Load()
	for _, way := range []func(fd int, f *flight) (*stop, error){k.filterWay, k.ttlWay} {
		s, err := way(fd, f)
		if err == nil {
			// Noted first: a connection may be made, and accepted, right after.
			in.inherited.Store(&inheritance{stop: s})
			if err = k.apply(fd, s); err == nil {
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
func (k *kernel) filterWay(fd int, _ *flight) (*stop, error) {
	switch some, _, err := k.filterOn(fd); {
	case err != nil:
		return nil, os.NewSyscallError("getsockopt", err)
	case some:
		return nil, errors.New("the socket has a filter of its own")
	}
	return &stop{filter: true}, nil
}

// ttlWay is the stop by a minimum TTL, if that stops anyone on fd. It drops the final
// ACK of a SYN cookie, so it does not serve where every handshake is made by one.
func (k *kernel) ttlWay(fd int, f *flight) (*stop, error) {
	if f.cookiesOnly {
		return nil, errors.New("a minimum TTL drops the handshakes of SYN cookies")
	}
	ttl, hops := k.minimumTTL(fd)
	switch most := max(ttl, hops); {
	case most == unknown:
		return nil, fmt.Errorf("a minimum TTL: %w", errors.ErrUnsupported)
	case most > mostTTL:
		return nil, fmt.Errorf("the socket has a minimum TTL of its own, %d", most)
	}
	return &stop{ttl: ttl, hops: hops}, nil
}

// minimumTTL reads IP_MINTTL and IPV6_MINHOPCOUNT of fd; -1 where it has no such option.
func (k *kernel) minimumTTL(fd int) (ttl, hops int) {
	read := func(level, name int) int {
		n, err := k.getInt(fd, level, name)
		if err != nil {
			return unknown
		}
		return n
	}
	return read(unix.IPPROTO_IP, unix.IP_MINTTL), read(unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT)
}

// apply puts s on fd, or leaves fd as it was.
func (k *kernel) apply(fd int, s *stop) error {
	if s.filter {
		return os.NewSyscallError("setsockopt", k.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]}))
	}
	// The mark comes first and goes last, so that whatever is found between is known
	// to be a drain's.
	err := k.setMark(fd, 1)
	if err == nil {
		err = k.setTTL(fd, s, maxTTL, maxTTL)
	}
	if err != nil {
		k.remove(fd, s)
	}
	return err
}

// setMark marks a minimum TTL as a drain's by SO_RXQ_OVFL, an option that TCP does not
// use. Without it nobody could tell it from one that the user set for GTSM (RFC 5082).
func (k *kernel) setMark(fd, value int) error {
	return k.setInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, value)
}

// stopOn returns the stop that is on fd, a listener or a connection that inherited
// it; nil if there is none. What the minimum TTL was before is not known then, and 0
// is the kernel's default.
func (k *kernel) stopOn(fd int) *stop {
	if _, ours, _ := k.filterOn(fd); ours {
		return &stop{filter: true}
	}
	if on, err := k.marked(fd); err != nil || !on {
		return nil
	}
	ttl, hops := k.minimumTTL(fd)
	if max(ttl, hops) != maxTTL {
		return nil
	}
	return &stop{ttl: min(ttl, 0), hops: min(hops, 0)}
}

// hasOtherFilter reports whether fd has a filter that is not dropSYN.
func (k *kernel) hasOtherFilter(fd int) bool {
	some, ours, _ := k.filterOn(fd)
	return some && !ours
}

// filterOn reports whether fd has some filter, and whether that is dropSYN.
func (k *kernel) filterOn(fd int) (some, ours bool, err error) {
	var p [len(dropSYN)]unix.SockFilter
	switch n, err := k.getFilter(fd, p[:]); {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES): // it is longer, or eBPF
		return true, false, nil
	case err != nil:
		return false, false, err
	default:
		return n > 0, n == len(dropSYN) && p == dropSYN, nil
	}
}

// marked reports whether a drain has set, or is setting, a minimum TTL on fd.
func (k *kernel) marked(fd int) (bool, error) {
	n, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL)
	return n != 0, err
}

// remove takes s from fd, a listener or a connection that inherited it.
func (k *kernel) remove(fd int, s *stop) error {
	if s.filter {
		err := k.setInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) { // another holder was quicker
			return nil
		}
		return err
	}
	if err := k.setTTL(fd, s, s.ttl, s.hops); err != nil {
		return err
	}
	return k.setMark(fd, 0)
}

// setTTL sets those of the two options that the socket has, the second also when
// the first fails.
func (k *kernel) setTTL(fd int, s *stop, ttl, hops int) error {
	var v4, v6 error
	if s.ttl != unknown {
		v4 = k.setInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, ttl)
	}
	if s.hops != unknown {
		v6 = k.setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, hops)
	}
	return cmp.Or(v4, v6)
}

// lift takes s from the listening socket fd, unless another holder has taken it or has
// put something else in its place. If that cannot be found out it is taken all the same.
func (k *kernel) lift(fd int, s *stop) error {
	var replaced bool
	if s.filter {
		replaced = k.hasOtherFilter(fd) && k.hasOtherFilter(fd) // one answer could be wrong
	} else {
		on, err := k.marked(fd)
		replaced = err == nil && !on && max(k.minimumTTL(fd)) != maxTTL
	}
	if replaced {
		return nil
	}
	return k.remove(fd, s)
}

// stands reports whether s is still on the listening socket fd. Another Listener over
// the socket, or Wrap, may have taken it off. If that cannot be found out it is there.
func (k *kernel) stands(fd int, s *stop) bool {
	if s.filter {
		_, ours, err := k.filterOn(fd)
		return ours || err != nil
	}
	ttl, hops := k.minimumTTL(fd)
	return max(ttl, hops) == maxTTL || max(ttl, hops) == unknown
}

// removeInherited takes from the connection fd what it inherited. With a minimum TTL it would
// hear nothing from its client. s is what its listener was stopped by; what the user
// has set on it is left alone.
func (k *kernel) removeInherited(fd int, s *stop) {
	on := k.stopOn(fd)
	if on == nil {
		return
	}
	if on.filter == s.filter {
		on = s // it knows the former values
	}
	k.remove(fd, on)
}

// liftLeft takes from the listening socket fd what a drain has left on it, and returns
// what connections in the queue may have inherited from it; nil if there was nothing.
func (k *kernel) liftLeft(fd int) (*inheritance, error) {
	s := k.stopOn(fd)
	if s == nil {
		return nil, nil
	}
	return &inheritance{stop: s, lifted: time.Now()}, k.remove(fd, s)
}

// duplicated reports which of the listeners this process has another descriptor of, as
// tableflip keeps one. If that cannot be found out, each is taken to have one.
func duplicated(listeners []*Listener) map[*Listener]bool {
	counts, err := listeners[0].kernel.descriptors()
	found := make(map[*Listener]bool)
	for _, l := range listeners {
		inode, statErr := l.inode()
		if errors.Is(statErr, net.ErrClosed) {
			continue // nothing is on a socket that is closed
		}
		found[l] = err != nil || statErr != nil || counts[inode] > 1
	}
	return found
}

// inode is the number by which the kernel tells the socket of l from others.
func (l *Listener) inode() (uint64, error) {
	var s unix.Stat_t
	var err error
	cerr := l.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &s) })
	return s.Ino, cmp.Or(cause(cerr), os.NewSyscallError("fstat", err))
}

// descriptors counts the descriptors of this process that name a socket, by inode. It
// looks at each descriptor of the process.
func descriptors() (counts map[uint64]int, err error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	counts = make(map[uint64]int)
	for _, name := range names {
		fd, err := parseSysctl(name)
		if err != nil {
			return nil, err
		}
		var s unix.Stat_t
		if unix.Fstat(fd, &s) == nil && s.Mode&unix.S_IFMT == unix.S_IFSOCK {
			counts[s.Ino]++
		}
	}
	return counts, nil
}
