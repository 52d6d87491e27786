package acceptq

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A steering leads new clients to the other listeners of a SO_REUSEPORT group while
// some of its listeners drain, by a classic BPF program that picks one for each SYN
// (SO_ATTACH_REUSEPORT_CBPF, socket(7)). Handshakes in flight stay where they are.
//
// The program names a listener by its index in an array of the kernel. No call tells
// that array, so it is followed from the time of listening: listen(2) appends to it, and
// a listener that closes leaves its place to the last one (reuseport_detach_sock in
// net/core/sock_reuseport.c). Several that are gone are taken to have closed the last
// one first, as Shards do. Where that is wrong the listeners that drain are given clients,
// whose SYNs they drop and count, and the next guess is tried. A wrong guess costs a
// client a second and never loses one.
type steering struct {
	kernel *kernel
	flight *flight // asks the kernel where the listeners are

	mu      sync.Mutex
	own     []*steered // those that drain and are not closed
	members []uint32   // the array as it is believed to be, by inode
	region  []int      // the indices of own when the first of them closed
	on      bool       // a program is attached
}

// A steered is a listener that drains.
type steered struct {
	l     *Listener
	inode uint32
	drops int64 // as last seen; -1 before that
}

// newSteering is nil if there is nothing to steer.
func newSteering(listeners []*Listener, f *flight) *steering {
	s := &steering{kernel: listeners[0].kernel, flight: f}
	for _, l := range listeners {
		var stat unix.Stat_t
		var err error
		if cerr := l.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &stat) }); cerr != nil || err != nil {
			return nil
		}
		if !l.steers || l.intake.isShared() {
			return nil
		}
		s.own = append(s.own, &steered{l, uint32(stat.Ino), unknown})
		if l.group != nil {
			s.members = slices.Clone(l.group)
		}
	}
	for _, own := range s.own {
		own.l.intake.steering.Store(s)
	}
	return s
}

// look follows the group and attaches the program that fits it. judge says that the
// listeners have stopped dropping what came before the program.
func (s *steering) look(ctx context.Context, judge bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.own) == 0 {
		return
	}
	listed, err := s.list(ctx)
	if err != nil {
		return // the program that is attached, if one is, still fits or is soon replaced
	}
	same := s.follow(listed)
	if s.dropped() && same && judge && s.on {
		last := len(s.members) - 1
		s.members = slices.Concat(s.members[last:], s.members[:last]) // guess again
		same = false
	}
	if !same || !s.on {
		s.attach(program(len(s.members), s.indices()))
	}
}

// list returns the group's listeners in the order of listen(2), by inode.
func (s *steering) list(ctx context.Context) (inodes []uint32, err error) {
	err = s.flight.ask(func() error {
		inodes, err = s.kernel.groupOf(ctx, s.own[0].l, s.own[0].inode)
		return err
	})
	return inodes, err
}

// noteGroup notes the group that the listeners have joined just now. If it cannot be
// listed a drain begins with what it finds then.
func noteGroup(ctx context.Context, listeners ...*Listener) {
	l := listeners[len(listeners)-1]
	if !l.steers {
		return
	}
	var stat unix.Stat_t
	var err error
	if cerr := l.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &stat) }); cerr != nil || err != nil {
		return
	}
	l.group, _ = l.kernel.groupOf(ctx, l, uint32(stat.Ino))
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
	if len(p) == 0 {
		s.detach()
		return
	}
	for _, own := range s.own {
		var err error
		cerr := own.l.raw.Control(func(fd uintptr) { err = s.kernel.attachProgram(int(fd), p) })
		if cerr == nil && err == nil {
			s.on = true
			return
		}
	}
}

func (s *steering) detach() {
	if !s.on {
		return
	}
	for _, own := range s.own {
		var err error
		cerr := own.l.raw.Control(func(fd uintptr) { err = s.kernel.detachProgram(int(fd)) })
		if cerr == nil && err == nil {
			s.on = false
			return
		}
	}
}

// off ends the steering of a drain that is undone or has failed.
func (s *steering) off() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.detach()
	for _, own := range s.own {
		own.l.intake.steering.CompareAndSwap(s, nil)
	}
	s.own = nil
}

// close closes l. The array of the group shrinks at that moment, so the program before
// it is one that leads nobody to the listeners that drain on either side of it.
func (s *steering) close(l *Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.own, func(own *steered) bool { return own.l == l })
	if i < 0 {
		return l.tcp.Close()
	}
	if !s.on {
		s.own = slices.Delete(s.own, i, i+1)
		return l.tcp.Close()
	}
	if s.region == nil {
		s.region = s.indices()
	}
	index := s.index(s.own[i])
	s.attach(lastProgram(len(s.members), s.region, s.indices(), index))
	err := l.tcp.Close()
	s.remove(index)
	s.own = slices.Delete(s.own, i, i+1)
	return err
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
	bpfRandom = 0xfffff000 + 56 // SKF_AD_OFF + SKF_AD_RANDOM
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
