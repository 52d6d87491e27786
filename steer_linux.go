package acceptq

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A steering leads new clients to the other listeners of a SO_REUSEPORT group while
// some of its listeners drain, by a classic BPF program that picks one for each SYN
// (SO_ATTACH_REUSEPORT_CBPF, socket(7)). Handshakes in flight stay where they are.
//
// The program names a listener by its index in an array of the kernel that no call
// tells. listen(2) appends to the array, and a listener that closes leaves its place to
// the last one (reuseport_detach_sock in net/core/sock_reuseport.c). So the array is
// worked out from the group as it was when the listener joined it and as it is now.
// Members that are gone are taken to have closed the last one first, as Shards do, and
// before others joined. Where that is wrong, the listeners that drain are given clients,
// whose SYNs they drop and count, and the next guess is tried. A wrong guess costs a
// client a second and never loses one.
type steering struct {
	kernel *kernel

	mu      sync.Mutex
	own     []*steered // those that drain and are not closed
	listed  []uint32   // the last listing of the group, by inode
	members []uint32   // the array as it is believed to be
	region  []int      // the indices of own when the first of them closed
	on      bool       // a program is attached
	suspect bool       // own dropped packets once under this guess
}

// A steered is a listener that drains.
type steered struct {
	l     *Listener
	inode uint32
	drops int64 // as last seen; -1 before that
}

// steeringOf returns what steers clients away from listeners; nil if that cannot be
// done. It is the same one for every drain of a listener, until it resumes.
func steeringOf(listeners []*Listener) *steering {
	var own []*steered
	for _, l := range listeners {
		inode, err := l.inode()
		if err != nil || !l.group.steers || l.intake.isShared() {
			return nil
		}
		own = append(own, &steered{l, uint32(inode), unknown})
	}
	s := &steering{kernel: listeners[0].kernel, members: slices.Clone(listeners[len(listeners)-1].group.members)}
	if in := &listeners[0].intake; !in.steering.CompareAndSwap(nil, s) {
		s = in.steering.Load()
	}
	for _, l := range listeners {
		if former := l.intake.steering.Swap(s); former != nil && former != s {
			former.leave(l) // it drained alone before, and now with others
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range own {
		if !slices.ContainsFunc(s.own, func(had *steered) bool { return had.l == o.l }) {
			s.own = append(s.own, o)
		}
	}
	return s
}

// look follows the group and attaches the program that fits it. judge says that a packet
// which the listeners drop now is a SYN that the program led to them. A handshake in
// flight can repeat its SYN, which is dropped too.
func (s *steering) look(ctx context.Context, f *flight, judge bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.own) == 0 || !s.list(ctx, f) {
		return // the program that is attached, if one is, fits as well as can be
	}
	same := s.follow(s.listed)
	dropped := s.dropped() && judge
	switch {
	case !same || !s.on:
		s.suspect = false
	case !dropped:
		return
	case !s.suspect: // a newcomer may have taken the program off
		s.suspect = true
	default:
		s.suspect = false
		last := len(s.members) - 1
		s.members = slices.Concat(s.members[last:], s.members[:last]) // guess again
	}
	s.attach(program(len(s.members), s.indices()))
}

// list brings listed up to date, and reports whether it can be believed. A listing comes
// in several datagrams and can leave rows out while others join or close, so a change is
// believed when it is listed twice.
func (s *steering) list(ctx context.Context, f *flight) bool {
	for range 2 {
		var listed []uint32
		err := f.ask(func() (err error) {
			listed, err = s.kernel.groupOf(ctx, s.own[0].l, s.own[0].inode)
			return err
		})
		for _, own := range s.own {
			if err != nil || !slices.Contains(listed, own.inode) {
				return false
			}
		}
		if slices.Equal(listed, s.listed) {
			return true
		}
		s.listed = listed
	}
	return false
}

// note notes the group that l has joined just now. If it cannot be listed a drain begins
// with what it finds then.
func (m *membership) note(ctx context.Context, l *Listener) {
	if !m.steers {
		return
	}
	inode, err := l.inode()
	if err != nil {
		return
	}
	s := &steering{kernel: l.kernel, own: []*steered{{l: l, inode: uint32(inode)}}}
	here := new(flight) // the calling thread made the socket
	for range 2 {
		if s.list(ctx, here) {
			m.members = s.listed
			return
		}
	}
}

// follow brings members to what is listed, and reports whether nothing has changed.
func (s *steering) follow(listed []uint32) (same bool) {
	same = true
	for i := len(s.members) - 1; i >= 0; i-- {
		if !slices.Contains(listed, s.members[i]) {
			s.remove(i)
			same = false
		}
	}
	for _, inode := range listed {
		if !slices.Contains(s.members, inode) {
			s.members = append(s.members, inode)
			same = false
		}
	}
	return same
}

// remove is what the kernel does when member i closes.
func (s *steering) remove(i int) {
	last := len(s.members) - 1
	s.members[i] = s.members[last]
	s.members = s.members[:last]
}

// dropped reports whether one of the listeners has dropped a packet since the last look.
func (s *steering) dropped() (yes bool) {
	for _, own := range s.own {
		stats, err := readStats(s.kernel, own.l.raw, own.l.transport)
		if err != nil {
			continue
		}
		yes = yes || own.drops != unknown && stats.Drops > own.drops
		own.drops = stats.Drops
	}
	return yes
}

// indices are those of the listeners that drain.
func (s *steering) indices() (all []int) {
	for _, own := range s.own {
		all = append(all, s.index(own))
	}
	return all
}

func (s *steering) index(own *steered) int { return slices.Index(s.members, own.inode) }

// attach puts a program on the group in the place of any other; none takes it off.
func (s *steering) attach(p []unix.SockFilter) {
	for _, own := range s.own {
		if len(p) == 0 {
			s.detach(own.l)
			return
		}
		if s.put(own.l, p) == nil {
			s.on = true
			return
		}
	}
}

func (s *steering) put(l *Listener, p []unix.SockFilter) (err error) {
	cerr := l.raw.Control(func(fd uintptr) { err = s.kernel.attachProgram(int(fd), p) })
	return cmp.Or(cerr, err)
}

// detach takes the program off the group of l. Kernels before 5.3 cannot: there a program
// is left that picks nobody, so that the kernel falls back to its hash.
func (s *steering) detach(l *Listener) {
	if !s.on {
		return
	}
	var err error
	cerr := l.raw.Control(func(fd uintptr) { err = s.kernel.detachProgram(int(fd)) })
	if cmp.Or(cerr, err) != nil {
		err = s.put(l, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32}})
	}
	s.on = err != nil
}

// leave is for a listener that drains no longer: it is given clients again.
func (s *steering) leave(l *Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.intake.steering.CompareAndSwap(s, nil)
	s.own = slices.DeleteFunc(s.own, func(own *steered) bool { return own.l == l })
	switch {
	case len(s.own) == 0:
		s.detach(l)
	case s.on:
		s.attach(program(len(s.members), s.indices()))
	}
}

// close closes l. The array of the group shrinks at that moment, so the program before
// it is one that leads nobody to the listeners that drain on either side of it.
func (s *steering) close(l *Listener) error {
	s.closes(l)
	return l.tcp.Close()
}

func (s *steering) closes(l *Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.own, func(own *steered) bool { return own.l == l })
	if i < 0 {
		return
	}
	if index := s.index(s.own[i]); s.on && index >= 0 {
		if s.region == nil {
			s.region = s.indices()
		}
		s.attach(lastProgram(len(s.members), s.region, s.indices(), index))
		s.remove(index)
	}
	s.own = slices.Delete(s.own, i, i+1)
}

// closingOrder is the order in which the listeners of a group are to close, so that the
// next generation can follow the array: the last one first.
func closingOrder(listeners []*Listener) []*Listener {
	order := slices.Clone(listeners)
	slices.Reverse(order)
	s := order[0].intake.steering.Load()
	if s == nil {
		return order
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	index := make(map[*Listener]int)
	for _, own := range s.own {
		index[own.l] = s.index(own)
	}
	slices.SortStableFunc(order, func(a, b *Listener) int { return index[b] - index[a] })
	return order
}

// Instructions of classic BPF, linux/filter.h.
const (
	bpfRandom uint32 = 0xfffff000 + 56 // SKF_AD_OFF + SKF_AD_RANDOM
	// The kernel takes 4096 instructions, BPF_MAXINSNS.
	mostExcluded = 4096 - 3
)

// program picks one of n members at random, all but the excluded ones: nil if there is
// none left, or too many are excluded.
//
// A number of those left is drawn, and moved past each excluded index in turn.
func program(n int, excluded []int) (p []unix.SockFilter) {
	excluded = slices.Sorted(slices.Values(excluded))
	left := n - len(excluded)
	if left <= 0 || 2*len(excluded) > mostExcluded {
		return nil
	}
	p = append(p,
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: bpfRandom},
		unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(left)})
	for _, e := range excluded {
		p = append(p,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: uint32(e), Jf: 1},
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_ADD | unix.BPF_K, K: 1})
	}
	return append(p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_A})
}

// lastProgram is the program for the close of member index, one of own. The last member
// of the array takes its place, so index n-1 is of nobody afterwards, and the kernel
// falls back to its hash there. What is in region has been own: who is where in it is
// less certain than the rest.
func lastProgram(n int, region, own []int, index int) []unix.SockFilter {
	past := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(n - 1)}}
	if len(own) == 1 {
		if index < n-1 {
			return past
		}
		return program(n, own)
	}
	for _, uncertain := range [][]int{region, nil} {
		excluded := map[int]bool{n - 1: true}
		for _, i := range slices.Concat(own, uncertain) {
			excluded[i] = i < n
		}
		maps.DeleteFunc(excluded, func(_ int, in bool) bool { return !in })
		if p := program(n, slices.Collect(maps.Keys(excluded))); p != nil {
			return p
		}
	}
	return past
}

// attachProgram attaches a program to the SO_REUSEPORT group of fd.
func attachProgram(fd int, p []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]})
}

// detachProgram takes the program off the SO_REUSEPORT group of fd. It is not an error
// that there is none.
func detachProgram(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// A membership is what a listener knows of its group.
type membership struct {
	steers  bool     // a drain may steer new clients to the others
	members []uint32 // those when it had joined them, by inode
}

// joinGroup is for a listener that listens now. With a program that a killed process left
// on the group, one member alone would be given clients.
func (l *Listener) joinGroup(o *options) {
	if !o.reusePort {
		return
	}
	// A connection that moves from a listener that drains is still marked by that.
	if l.kernel.ipv4Setting("tcp_migrate_req") == 1 {
		l.intake.inherited.Store(&inheritance{stop: new(stop)})
	}
	if l.group.steers = o.steers && !o.unsteered; l.group.steers {
		// It is not an error that there is none, or that the kernel knows of none.
		l.raw.Control(func(fd uintptr) { l.kernel.detachProgram(int(fd)) })
	}
}

// isShared reports whether another holder has the socket, or may have it.
func (in *intake) isShared() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.shared
}
