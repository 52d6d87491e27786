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

// A stop keeps new clients from a listening socket, while in-flight handshakes continue.
// Connections that are made in the meantime inherit it.
type stop struct {
	filter bool // a socket filter drops SYNs
	// If filter is false, the stop is a minimum TTL of 255, which few systems send. ttl
	// and hops are the former values of IP_MINTTL and IPV6_MINHOPCOUNT. -1 means that
	// the socket does not have the option.
	ttl, hops int
}

const (
	maxTTL = 255
	// Systems use the initial TTLs 64, 128 and 255. If the minimum TTL of a listener is
	// above 128, its clients send with 255, and a minimum of 255 would stop none of them.
	mostTTL = 128
)

// dropSYN is a socket filter that drops a SYN without an ACK and passes all other
// packets. A socket filter sees a packet from its TCP header on, and byte 13 holds the
// flags.
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

// stopIntake keeps new clients from the listening socket fd. The error says why it
// cannot. If the socket already has a stop, that stop is used: a process that was killed
// or another holder of the socket has set it.
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
			// This is stored before apply, because a connection may inherit the stop and
			// be accepted right after it.
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

// filterWay returns the stop by a socket filter. It fails if fd has a filter, because
// that filter belongs to the caller and would be replaced.
func (k *kernel) filterWay(fd int, _ *flight) (*stop, error) {
	switch some, _, err := k.filterOn(fd); {
	case err != nil:
		return nil, os.NewSyscallError("getsockopt", err)
	case some:
		return nil, errors.New("the socket has a filter of its own")
	}
	return &stop{filter: true}, nil
}

// ttlWay returns the stop by a minimum TTL. It fails if a minimum TTL would stop no
// client of fd. It also fails if every handshake uses a SYN cookie, because a minimum TTL
// drops the final ACKs of those.
func (k *kernel) ttlWay(fd int, f *flight) (*stop, error) {
	if f.cookiesOnly {
		return nil, errors.New("net.ipv4.tcp_syncookies is 2, and a minimum TTL drops handshakes that use SYN cookies")
	}
	ttl, hops := k.minimumTTL(fd)
	switch most := max(ttl, hops); {
	case most == unknown:
		return nil, fmt.Errorf("the socket has no minimum TTL: %w", errors.ErrUnsupported)
	case most > mostTTL:
		return nil, fmt.Errorf("the socket has a minimum TTL of its own, %d", most)
	}
	return &stop{ttl: ttl, hops: hops}, nil
}

// minimumTTL reads IP_MINTTL and IPV6_MINHOPCOUNT of fd. A value is -1 if the socket does
// not have the option.
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

// apply sets s on fd. If that fails, fd is as before.
func (k *kernel) apply(fd int, s *stop) error {
	if s.filter {
		return os.NewSyscallError("setsockopt", k.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]}))
	}
	// The mark is set first and removed last. So a minimum TTL that a drain has set is
	// always marked.
	err := k.setMark(fd, 1)
	if err == nil {
		err = k.setTTL(fd, s, maxTTL, maxTTL)
	}
	if err != nil {
		k.remove(fd, s)
	}
	return err
}

// setMark marks the minimum TTL of fd as set by a drain. The mark is SO_RXQ_OVFL, an
// option that TCP does not use. Without the mark, a minimum TTL that the caller set for
// GTSM (RFC 5082) would look the same.
func (k *kernel) setMark(fd, value int) error {
	return k.setInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, value)
}

// stopOn returns the stop on fd, a listener or a connection that inherited the stop. It
// returns nil if there is none. The former minimum TTL is unknown, so the stop has the
// kernel's default, 0.
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

// filterOn reports whether fd has a filter, and whether that filter is dropSYN.
func (k *kernel) filterOn(fd int) (some, ours bool, err error) {
	var p [len(dropSYN)]unix.SockFilter
	switch n, err := k.getFilter(fd, p[:]); {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES): // the filter is longer than p, or eBPF
		return true, false, nil
	case err != nil:
		return false, false, err
	default:
		return n > 0, n == len(dropSYN) && p == dropSYN, nil
	}
}

// marked reports whether fd has the mark of setMark.
func (k *kernel) marked(fd int) (bool, error) {
	n, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL)
	return n != 0, err
}

// remove removes s from fd, a listener or a connection that inherited s.
func (k *kernel) remove(fd int, s *stop) error {
	if s.filter {
		err := k.setInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) { // another holder has removed it
			return nil
		}
		return err
	}
	if err := k.setTTL(fd, s, s.ttl, s.hops); err != nil {
		return err
	}
	return k.setMark(fd, 0)
}

// setTTL sets both options, as far as the socket has them. If the first fails, it still
// sets the second.
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

// lift removes s from the listening socket fd. It does nothing if another holder has
// replaced s. If that cannot be determined, it removes s.
func (k *kernel) lift(fd int, s *stop) error {
	var replaced bool
	if s.filter {
		first, again := k.hasOtherFilter(fd), k.hasOtherFilter(fd) // one answer could be wrong
		replaced = first && again
	} else {
		on, err := k.marked(fd)
		replaced = err == nil && !on && max(k.minimumTTL(fd)) != maxTTL
	}
	if replaced {
		return nil
	}
	return k.remove(fd, s)
}

// stands reports whether s is still on the listening socket fd. Another Listener of the
// socket, or Wrap, may have removed it. If that cannot be determined, stands is true.
func (k *kernel) stands(fd int, s *stop) bool {
	if s.filter {
		_, ours, err := k.filterOn(fd)
		return ours || err != nil
	}
	ttl, hops := k.minimumTTL(fd)
	return max(ttl, hops) == maxTTL || max(ttl, hops) == unknown
}

// removeInherited removes from the connection fd the stop s that it inherited from its
// listener. With a minimum TTL it would receive nothing from its client. Settings of the
// caller are not changed.
func (k *kernel) removeInherited(fd int, s *stop) {
	on := k.stopOn(fd)
	if on == nil {
		return
	}
	if on.filter == s.filter {
		on = s // s has the former values
	}
	k.remove(fd, on)
}

// liftLeft removes the stop that a killed process has left on the listening socket fd. It
// returns what connections in the queue may have inherited, or nil if there was no stop.
func (k *kernel) liftLeft(fd int) (*inheritance, error) {
	s := k.stopOn(fd)
	if s == nil {
		return nil, nil
	}
	return &inheritance{stop: s, lifted: time.Now()}, k.remove(fd, s)
}

// duplicated reports for each listener whether this process has a second descriptor of
// its socket. If that cannot be determined, the result is true.
func duplicated(listeners []*Listener) map[*Listener]bool {
	counts, err := listeners[0].kernel.descriptors()
	found := make(map[*Listener]bool)
	for _, l := range listeners {
		inode, statErr := l.inode()
		if errors.Is(statErr, net.ErrClosed) {
			continue // a closed socket has nothing to restore
		}
		found[l] = err != nil || statErr != nil || counts[inode] > 1
	}
	return found
}

// duplicates calls f and reports whether f has left a duplicate of the descriptor fd. The
// kernel assigns the lowest free number to a new descriptor. So duplicates compares the
// sockets from the lowest number that was free before f to the one that is free afterwards.
//
// It does not find a duplicate at a number of the caller's choice, as dup3(2) makes it, or
// at a number that another goroutine freed during f. It finds nothing if the process has no
// descriptor left. The check at the end of a drain finds these, unless they are closed.
func duplicates(fd int, f func()) bool {
	before, err := lowestFree()
	f()
	if err != nil {
		return false
	}
	after, err := lowestFree()
	if err != nil { // f, or another goroutine, has taken the last ones
		after = before + 1
	}
	var own, s unix.Stat_t
	if unix.Fstat(fd, &own) != nil {
		return false
	}
	for n := before; n < after; n++ {
		if n != fd && unix.Fstat(n, &s) == nil && s.Dev == own.Dev && s.Ino == own.Ino {
			return true
		}
	}
	return false
}

// lowestFree returns the lowest number that no descriptor of this process has.
func lowestFree() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err == nil {
		unix.Close(fd)
	}
	return fd, err
}

// inode returns the inode number of the socket of l, which identifies it.
func (l *Listener) inode() (uint64, error) {
	var s unix.Stat_t
	var err error
	cerr := l.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &s) })
	return s.Ino, cmp.Or(cause(cerr), os.NewSyscallError("fstat", err))
}

// descriptors returns how many descriptors of this process refer to each socket, by
// inode. It checks every descriptor of the process.
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
