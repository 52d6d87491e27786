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

// A steering directs new clients to the other listeners of a SO_REUSEPORT group while
// some of its listeners drain. It attaches a classic BPF program that picks a listener
// for each SYN (SO_ATTACH_REUSEPORT_CBPF, socket(7)). In-flight handshakes do not move.
//
// The program names a listener by its index in an array of the kernel, which no system
// call reports. listen(2) appends to the array. When a listener closes, the last one
// takes its place (reuseport_detach_sock in net/core/sock_reuseport.c). The array is
// therefore computed from the group when the listener joined it and the group now.
//
// The computation assumes that members which are gone have closed in the order of
// Shards.Close, the last one first, and before others joined. If that is wrong, the
// kernel assigns clients to a draining listener. The listener drops their SYNs, the
// kernel counts them, and the steering tries the next order. Each of these clients
// waits for a second. None is lost.
type steering struct {
	kernel *kernel

	mu      sync.Mutex
	own     []*steered // the listeners that drain and are not closed
	listed  []uint32   // the last listing of the group, by inode
	members []uint32   // the assumed order of the array, by inode
	region  []int      // the indices of own when the first of them closed
	on      bool       // a program is attached
	suspect bool       // a listener of own has dropped packets once with this order
}

// A steered is a listener that drains.
type steered struct {
	l     *Listener
	inode uint32
	drops int64 // the last reading of Stats.Drops; -1 before the first
}

// steeringOf returns the steering that directs clients away from listeners. It returns
// nil if that is not possible. All drains of a listener share one steering, until Resume.
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
			former.leave(l) // l was in another group of draining listeners
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

// look lists the group and attaches the program for it. judge means that a packet which
// the listeners drop now proves that the order is wrong. That is not so while handshakes
// are in flight: a client can repeat its SYN, which is dropped too.
func (s *steering) look(ctx context.Context, f *flight, judge bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.own) == 0 || !s.list(ctx, f) {
		return // keep the current program
	}
	same := s.follow(s.listed)
	dropped := s.dropped() && judge
	switch {
	case !same || !s.on:
		s.suspect = false
	case !dropped:
		return
	case !s.suspect: // a listener that joined may have detached the program
		s.suspect = true
	default:
		s.suspect = false
		last := len(s.members) - 1
		s.members = slices.Concat(s.members[last:], s.members[:last]) // try the next order
	}
	s.attach(program(len(s.members), s.indices()))
}

// list updates listed and reports whether it is reliable. The kernel sends a listing in
// several datagrams. If a listener joins or closes meanwhile, rows may be missing. A
// change is therefore accepted only if two listings agree.
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

// note stores the group that l has just joined. If it cannot be listed, a drain starts from
// the group that it finds then.
func (m *membership) note(ctx context.Context, l *Listener) {
	if !m.steers {
		return
	}
	inode, err := l.inode()
	if err != nil {
		return
	}
	s := &steering{kernel: l.kernel, own: []*steered{{l: l, inode: uint32(inode)}}}
	here := new(flight) // the socket is in the namespace of the calling thread
	for range 2 {
		if s.list(ctx, here) {
			m.members = s.listed
			return
		}
	}
}

// follow updates members from listed. It reports whether nothing has changed.
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

// remove removes member i as the kernel does when that member closes.
func (s *steering) remove(i int) {
	last := len(s.members) - 1
	s.members[i] = s.members[last]
	s.members = s.members[:last]
}

// dropped reports whether a listener of own has dropped a packet since the last call.
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

// indices returns the indices of the listeners that drain.
func (s *steering) indices() (all []int) {
	for _, own := range s.own {
		all = append(all, s.index(own))
	}
	return all
}

func (s *steering) index(own *steered) int { return slices.Index(s.members, own.inode) }

// attach attaches the program p to the group and replaces any other. An empty p detaches
// the program.
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

// detach detaches the program from the group of l. Kernels before 5.3 cannot do that.
// There detach attaches a program that picks no listener, so that the kernel uses its
// hash again.
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

// leave removes a listener that no longer drains. The kernel assigns clients to it again.
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

// close closes l. The array changes at that moment. So close first attaches a program that
// picks no draining listener both before and after the change.
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

// closingOrder returns the listeners in the order in which they are to close: the last
// one in the array first. Other processes that drain assume this order.
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
	// The kernel accepts at most 4096 instructions, BPF_MAXINSNS.
	mostExcluded = 4096 - 3
)

// program returns a program that picks one of n members at random, except the excluded
// ones. It returns nil if no member is left or if too many are excluded.
//
// The program takes a random number below the number of members that are left. It then
// adds 1 for each excluded index that is not above the number, in ascending order.
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

// lastProgram returns the program for the close of the member at index, one of own. The
// last member of the array takes its place. Afterwards no member has index n-1, and the
// kernel uses its hash for it. region holds the indices that draining listeners have had.
// Their order is less certain, so the program avoids them if it can.
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

// detachProgram detaches the program from the SO_REUSEPORT group of fd. It is not an error
// if there is none.
func detachProgram(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// A membership is what a listener knows of its group.
type membership struct {
	steers  bool     // a drain may steer new clients to the other members
	members []uint32 // the members right after the listener joined, by inode
}

// joinGroup prepares a listener that has just joined a group. A process that was killed can
// have left a program on the group, which would give all clients to one member.
func (l *Listener) joinGroup(o *options) {
	if !o.reusePort {
		return
	}
	// A connection that moves here when a draining listener closes may have inherited
	// its stop.
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
