package intake

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// A Steering directs new clients to the other listeners of a SO_REUSEPORT group while some
// of its listeners drain. It attaches a classic BPF program that picks a listener for each
// SYN (SO_ATTACH_REUSEPORT_CBPF, socket(7)). In-flight handshakes do not move.
//
// The program names a listener by its index in an array of the kernel. listen(2) appends to
// the array. When a listener closes, the last one takes its place (reuseport_detach_sock in
// net/core/sock_reuseport.c). A question tells the steering which indices answer, and the
// program picks one of these. A listener that drains in another process does not answer, so
// processes that drain at the same time do not direct clients to each other.
//
// All listeners of a group that drain in this process share one steering.
type Steering struct {
	Calls  *sys.Calls
	Groups *Groups
	Key    groupKey

	entry sync.Mutex    // allows one wait for other processes at a time; taken before turn
	turn  chan struct{} // holds a value while a question is asked; taken before mu
	next  time.Time     // when to check the group again
	pause time.Duration // how long to wait between two checks
	asked time.Time     // when the kernel was asked last
	late  bool          // the turn of the last question did not come in time
	// silenced has the inodes of own when the kernel answered the last question. It is nil if
	// the question was not asked, or if no member has answered.
	silenced []uint32
	drops    uint32 // the packets that own had dropped after the last question

	Mu      sync.Mutex
	Own     []*steered        // the listeners that drain and are not closed
	listed  []uint32          // the inodes of the group that was asked, in ascending order
	full    int               // how many other members had a full queue then
	answers []int             // the indices that answered
	program []unix.SockFilter // decides for new clients; nil if the hash of the kernel does
	On      bool              // a program is on the group
	spare   int               // how many of own may close before program is wrong
	release func()            // lets another process begin a drain; nil if none has begun here
}

// A steered is a listener that drains.
type steered struct {
	raw   syscall.RawConn
	inode uint32
	// mark makes the socket drop SYNs whose TTL is ttl, unless it drops all SYNs. undo is
	// never nil.
	mark func(v4 bool) (ttl int, undo func(), err error)
}

const (
	steerList = 25 * time.Millisecond // how often a drain lists the group
	// steerDrops is the number of dropped packets after which a drain asks again.
	steerDrops = 4
	steerAsk   = 250 * time.Millisecond // how often a drain asks the kernel while other members are silent
	// steerWait is how long the begin of a drain, Resume and Close may wait for other
	// processes that do the same.
	steerWait = time.Second
	// turnWait is how long a question may wait for those of other processes. A process that
	// is stopped in a question, or that is hostile, ends it never. So the next question waits
	// for lateWait only.
	turnWait = steerWait / 2
	lateWait = 20 * time.Millisecond
	forkWait = 100 * time.Millisecond // how long a close keeps the process from starting others
)

// A groupKey identifies a SO_REUSEPORT group.
type groupKey struct {
	namespace uint64 // SO_NETNS_COOKIE; an inode if the kernel does not have that option
	at        netip.AddrPort
	family    uint8
	v6only    bool
	device    uint32 // the interface that the group is bound to; 0 if there is none
	uid       uint32
}

// keyOf returns the key of the group of a listener, without the namespace.
func keyOf(r sockdiag.Row) groupKey {
	return groupKey{at: r.Local, family: r.Family, v6only: r.V6Only, device: r.Device, uid: r.UID}
}

// address returns where the clients of this host reach the group: its own address, or that
// of the loopback interface if the group listens on all addresses.
func (k groupKey) address() netip.AddrPort {
	switch {
	case !k.at.Addr().IsUnspecified():
		return k.at
	case k.v6only:
		return netip.AddrPortFrom(netip.IPv6Loopback(), k.at.Port())
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), k.at.Port())
}

// groupRows lists the group of the listener with the given inode, in the calling thread's
// network namespace.
func groupRows(k *sys.Calls, ctx context.Context, family uint8, port uint16, inode uint32) ([]sockdiag.Row, error) {
	rows, err := drainDump(k, ctx, sockdiag.Request{Family: family, Port: port, States: 1 << tcpinfo.Listen}, func(sockdiag.Row) bool { return true })
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(rows, func(r sockdiag.Row) bool { return r.Inode == inode })
	if i < 0 {
		return nil, errors.New("sock_diag does not list the listener")
	}
	key := keyOf(rows[i])
	return slices.DeleteFunc(rows, func(r sockdiag.Row) bool { return keyOf(r) != key }), nil
}

// Groups holds the steerings of a process.
type Groups struct {
	mu  sync.Mutex
	all map[groupKey]*Steering
}

// groupsOf returns the groups from which this process steers clients away.
func groupsOf(k *sys.Calls) *Groups {
	all, _ := k.Memory.LoadOrStore(groupsKey{}, new(Groups))
	return all.(*Groups)
}

type groupsKey struct{}

// join returns the steering of a group and adds own to it.
func (g *Groups) join(k *sys.Calls, key groupKey, own []*steered) *Steering {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.all[key]
	if s == nil {
		s = &Steering{Calls: k, Groups: g, Key: key, turn: make(chan struct{}, 1), pause: steerList}
		if g.all == nil {
			g.all = make(map[groupKey]*Steering)
		}
		g.all[key] = s
	}
	s.Mu.Lock()
	defer s.Mu.Unlock()
	for _, o := range own {
		if !s.has(o.inode) {
			s.Own = append(s.Own, o)
		}
	}
	return s
}

// of returns the steering of a group, or nil.
func (g *Groups) of(key groupKey) *Steering {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all[key]
}

// forget removes listeners from s. If none is left, s is no longer the steering of its group.
// If the listeners are still open, it then detaches the program, which another process that
// has joined the group may have attached.
func (g *Groups) forget(s *Steering, open bool, inodes ...uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s.Mu.Lock()
	defer s.Mu.Unlock()
	left := slices.DeleteFunc(slices.Clone(s.Own), func(o *steered) bool { return slices.Contains(inodes, o.inode) })
	if len(left) == 0 && open {
		s.detach()
	}
	s.Own = left
	if len(left) > 0 {
		return
	}
	if g.all[s.Key] == s {
		delete(g.all, s.Key)
	}
	if s.release != nil {
		s.release()
		s.release = nil
	}
}

func (s *Steering) has(inode uint32) bool {
	return slices.ContainsFunc(s.Own, func(o *steered) bool { return o.inode == inode })
}

// draining returns the listeners of this process that drain.
func (s *Steering) draining() []*steered {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	return slices.Clone(s.Own)
}

// lock begins a turn of s. It fails if ctx ends first.
func (s *Steering) lock(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Steering) tryLock() bool {
	select {
	case s.turn <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s *Steering) unlock() { <-s.turn }

// begin directs new clients away from the listeners that have joined s, and then calls stop,
// which makes these listeners drop SYNs. The order matters: a dropped SYN delays its client
// by a second. No other process asks the group in between.
func (s *Steering) begin(ctx context.Context, stop func()) {
	if s == nil {
		stop()
		return
	}
	s.awaitDrains(ctx)
	// This happens even if ctx has ended: the listeners drop SYNs all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), steerWait)
	defer cancel()
	if s.lock(ctx) == nil {
		defer s.unlock()
		if !s.isRight() {
			defer s.refresh(ctx)()
		}
	}
	stop()
}

// isRight reports whether the program picks none of the listeners that drain: the last
// question was a moment ago, and all of them had joined s then. That is so if many listeners
// begin to drain at the same time, each by a call of its own.
func (s *Steering) isRight() bool {
	if time.Since(s.asked) > steerList {
		return false
	}
	for _, o := range s.draining() {
		if !slices.Contains(s.silenced, o.inode) {
			return false
		}
	}
	return true
}

// awaitDrains waits until no other process drains a member of the group, but not longer than
// steerWait, and at most half of the time that ctx has. With one drain at a time there is
// always a program that is right.
func (s *Steering) awaitDrains(ctx context.Context) {
	wait := steerWait
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	s.entry.Lock()
	defer s.entry.Unlock()
	s.Mu.Lock()
	waits := s.release == nil && len(s.Own) > 0
	own := s.Own
	s.Mu.Unlock()
	if !waits {
		return
	}
	where, err := netns.NamespaceOfSocket(s.Calls, own[0].raw)
	if err != nil {
		return
	}
	defer where.Close()
	where.In(func() error {
		release := takeTurn(s.Calls, ctx, "drain", s.Key)
		s.Mu.Lock()
		defer s.Mu.Unlock()
		if s.release = release; len(s.Own) == 0 { // all have closed meanwhile
			s.release = nil
			release()
		}
		return nil
	})
}

// look checks whether the program is still right. A drain calls it at each of its looks. If
// another drain of the group is doing that, it does nothing.
func (s *Steering) look(ctx context.Context) {
	if s == nil || !s.tryLock() {
		return
	}
	defer s.unlock()
	now := time.Now()
	if now.Before(s.next) {
		return
	}
	s.next = now.Add(s.pause)
	own := s.draining()
	if len(own) == 0 || !s.suspect(ctx, own, now) {
		return
	}
	before := s.known()
	// If another process does not end its turn, the drain goes on, and the next look tries
	// again.
	ctx, cancel := context.WithTimeout(ctx, steerAsk)
	defer cancel()
	s.refresh(ctx)()
	// Questions of other processes make own drop packets too. So the pause becomes longer
	// while the answer does not change.
	if slices.Equal(before, s.known()) {
		s.pause = min(2*s.pause, steerAsk)
	} else {
		s.pause = steerList
	}
	s.next = time.Now().Add(s.pause)
}

// known returns the indices that answered the last question.
func (s *Steering) known() []int {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	return s.answers
}

// suspect reports whether the program may be wrong: the group has changed, or another member
// was silent a while ago, or own has dropped packets, which may be the SYNs of clients. One
// such packet may come from the question of another process.
func (s *Steering) suspect(ctx context.Context, own []*steered, now time.Time) bool {
	q := question{calls: s.Calls, own: own}
	if drops, err := q.drops(); err == nil && drops-s.drops >= steerDrops {
		return true
	}
	s.Mu.Lock()
	silent := len(s.listed) > len(own)+len(s.answers) // they may answer by now
	known := s.listed
	s.Mu.Unlock()
	if silent && now.Sub(s.asked) > steerAsk {
		return true
	}
	listed, _, err := s.members(ctx, own, 1)
	return err == nil && !slices.Equal(listed, known)
}

// members lists the group in the network namespace of its sockets. It returns the inodes in
// ascending order, and how many members other than own have a full queue. The kernel sends a
// listing in several datagrams. If a listener joins or closes meanwhile, rows may be missing.
// A listing is therefore accepted only if it has all of own and times listings in a row are
// equal.
func (s *Steering) members(ctx context.Context, own []*steered, times int) (listed []uint32, full int, err error) {
	where, err := netns.NamespaceOfSocket(s.Calls, own[0].raw)
	if err != nil {
		return nil, 0, err
	}
	defer where.Close()
	err = where.In(func() error {
		equal := 0
		for range 4 {
			rows, err := groupRows(s.Calls, ctx, s.Key.family, s.Key.at.Port(), own[0].inode)
			if err != nil {
				return err
			}
			before := listed
			listed, full = nil, 0
			for _, r := range rows {
				listed = append(listed, r.Inode)
				isOwn := slices.ContainsFunc(own, func(o *steered) bool { return o.inode == r.Inode })
				if !isOwn && r.Rqueue > r.Wqueue {
					full++
				}
			}
			slices.Sort(listed)
			missing := slices.ContainsFunc(own, func(o *steered) bool { return !slices.Contains(listed, o.inode) })
			switch {
			case missing:
				equal = 0
			case equal > 0 && slices.Equal(before, listed):
				equal++
			default:
				equal = 1
			}
			if equal == times {
				return nil
			}
		}
		return errors.New("the group changes while it is listed")
	})
	return listed, full, err
}

// refresh asks the kernel about the group and attaches the program for the answer. It must
// be called in a turn of s. No other process asks the group until end is called, unless its
// own question took longer than turnWait.
//
// If the group cannot be listed, the program stays. If the question fails, the kernel uses
// its hash, as without steering.
func (s *Steering) refresh(ctx context.Context) (end func()) {
	end = func() {}
	s.silenced = nil
	own := s.draining()
	if len(own) == 0 {
		return end
	}
	where, err := netns.NamespaceOfSocket(s.Calls, own[0].raw)
	if err != nil {
		return end
	}
	defer where.Close()
	where.In(func() error {
		wait := turnWait
		if s.late {
			wait = lateWait
		}
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		end = takeTurn(s.Calls, ctx, "question", s.Key)
		s.late = ctx.Err() != nil
		return nil
	})
	s.asked = time.Now()
	listed, full, err := s.members(ctx, own, 2)
	if err != nil {
		return end
	}
	var answers []int
	if len(listed) > len(own) { // there is somebody else to ask
		where.In(func() (err error) {
			answers, err = s.Ask(ctx, len(listed), own)
			return err
		})
	}
	q := question{calls: s.Calls, own: own}
	s.drops, _ = q.drops()
	s.Mu.Lock()
	defer s.Mu.Unlock()
	if ctx.Err() != nil { // the question was not asked to its end
		s.reattach()
		return end
	}
	s.listed, s.full, s.answers, s.spare = listed, full, answers, 0
	if len(listed) > len(own) && len(answers) == 0 {
		s.reattach() // nobody answers, so another program would not be better
		return end
	}
	for _, o := range own {
		s.silenced = append(s.silenced, o.inode)
	}
	s.put(picks(answers, len(listed)))
	return end
}

// Ask marks the listeners of own and asks the group, which has n members.
func (s *Steering) Ask(ctx context.Context, n int, own []*steered) ([]int, error) {
	ttl := MaxTTL
	for _, o := range own {
		t, undo, err := o.mark(s.Key.address().Addr().Is4())
		defer undo()
		if err != nil {
			return nil, err
		}
		ttl = min(ttl, t)
	}
	q := s.question(n, ttl, own)
	return q.ask(ctx)
}

// question returns a question to the group, which has n members.
func (s *Steering) question(n, ttl int, own []*steered) question {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	to := s.Key.address()
	return question{
		calls: s.Calls, to: to, device: s.Key.device, n: n, ttl: ttl, own: own, rest: s.rest(n),
		deaf: len(s.Own) > 0 && sendsWith(s.Calls, s.Own[0].raw, to.Addr().Is4()) == MaxTTL,
		attach: func(p []unix.SockFilter) error {
			s.Mu.Lock()
			defer s.Mu.Unlock()
			return s.attach(p)
		},
	}
}

// rest returns the program that decides for clients until the first member of a group of n
// answers a question. The caller holds mu.
func (s *Steering) rest(n int) []unix.SockFilter {
	if s.program == nil {
		return only(n - 1) // the newest member
	}
	if n < len(s.listed) {
		// Members have closed, and the last ones have taken their places. The program picks
		// indices that the group no longer has, and the kernel uses its hash for these, which also
		// picks listeners that drain. The other indices that answered are right, unless it was
		// such a listener that has moved.
		still := slices.DeleteFunc(slices.Clone(s.answers), func(i int) bool { return i >= n })
		if p := picks(still, n); p != nil {
			return p
		}
	}
	return s.program
}

// put makes p the program that decides for new clients. An empty p leaves that to the hash
// of the kernel. The caller holds mu.
func (s *Steering) put(p []unix.SockFilter) {
	s.program = p
	s.reattach()
}

// detach leaves new clients to the hash of the kernel, also if another process has attached
// the program. The caller holds mu.
func (s *Steering) detach() {
	s.On = true
	s.put(nil)
}

// reattach attaches the program that decides for new clients, in place of a question's. If
// nothing drains any longer, it detaches the program.
func (s *Steering) reattach() {
	if len(s.Own) == 0 {
		return
	}
	if len(s.program) > 0 && s.attach(s.program) == nil {
		return
	}
	s.program = nil
	for _, o := range s.Own {
		if s.On && detachFrom(s.Calls, o.raw) == nil {
			s.On = false
		}
	}
}

// attach attaches a program to the group and replaces any other.
func (s *Steering) attach(p []unix.SockFilter) error {
	err := error(net.ErrClosed)
	for _, o := range s.Own {
		if err = AttachTo(s.Calls, o.raw, p); err == nil {
			s.On = true
			return nil
		}
	}
	return err
}

// leave removes listeners that no longer drain. The kernel assigns clients to them again.
func (s *Steering) leave(inodes ...uint32) {
	s.Groups.forget(s, true, inodes...)
	if len(s.draining()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), steerWait)
	defer cancel()
	if s.lock(ctx) == nil {
		defer s.unlock()
		s.refresh(ctx)()
	}
}

// close closes a listener by calling closeSocket. The order of the group changes at that
// moment. So close first attaches a program that is right both before and after the change,
// and calls hide. alone calls a function while no goroutine uses the socket, so that
// closeSocket closes it at once.
func (s *Steering) close(inode uint32, hide func(), closeSocket func() error, alone func(func())) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), steerWait)
	defer cancel()
	if s.lock(ctx) != nil {
		defer s.Groups.forget(s, false, inode)
		return closeSocket()
	}
	defer s.unlock()
	place, end := s.prepare(ctx, inode)
	defer end()
	shut := func() {
		defer holdForks()()
		hide()
		if place >= 0 {
			s.Mu.Lock()
			s.put(only(place))
			s.Mu.Unlock()
		}
		err = closeSocket()
	}
	if place < 0 {
		shut()
	} else {
		// The only member that answers takes the place of the listener that closes, and
		// other members do not answer. No program is right before and after that.
		alone(shut)
	}
	s.Groups.forget(s, false, inode)
	s.Mu.Lock()
	s.listed = slices.DeleteFunc(s.listed, func(i uint32) bool { return i == inode })
	s.spare--
	wrong := s.spare < 0 && place < 0 && len(s.Own) > 0 && len(s.answers) > 0
	s.Mu.Unlock()
	if wrong {
		s.refresh(ctx)()
	}
	return err
}

// holdForks keeps this process from starting another one until release is called, but not
// longer than forkWait. A child that has not called execve(2) yet has a copy of each
// descriptor, and would put a close off. The limit matters if the close waits for code that
// uses the descriptor and starts a process, or if a child does not get to execve(2).
func holdForks() (release func()) {
	for end := time.Now().Add(forkWait); !syscall.ForkLock.TryRLock(); time.Sleep(questionLook) {
		if time.Now().After(end) {
			return func() {}
		}
	}
	release = sync.OnceFunc(syscall.ForkLock.RUnlock)
	time.AfterFunc(forkWait, release)
	return release
}

// prepare attaches the program for the close of a listener. If no program is right both
// before and after the close, it returns the index of the listener, otherwise -1. Other
// processes that close wait until end is called.
func (s *Steering) prepare(ctx context.Context, inode uint32) (place int, end func()) {
	place, end = -1, func() {}
	s.Mu.Lock()
	ready := !s.has(inode) || s.spare > 0 && len(s.Own) > 1
	s.Mu.Unlock()
	if ready {
		return place, end
	}
	end = s.refresh(ctx)
	s.Mu.Lock()
	n, moves := len(s.listed), false
	switch {
	case len(s.Own) == 1 && s.silenced == nil: // nobody would correct the program that this process leaves
		s.detach()
	case len(s.answers) > 0:
		var p []unix.SockFilter
		p, s.spare, moves = closing(n, s.answers, len(s.Own), s.full)
		s.put(p)
	}
	var silent []int
	for i := range n {
		if !slices.Contains(s.answers, i) {
			silent = append(silent, i)
		}
	}
	own := s.Own
	s.Mu.Unlock()
	// Resume may have removed the listener meanwhile.
	if i := slices.IndexFunc(own, func(o *steered) bool { return o.inode == inode }); i >= 0 && moves {
		place = s.locate(ctx, n, own[i], silent)
	}
	return place, end
}

// locate returns the index of a listener that drains, one of silent, or -1.
func (s *Steering) locate(ctx context.Context, n int, o *steered, silent []int) (place int) {
	where, err := netns.NamespaceOfSocket(s.Calls, o.raw)
	if err != nil {
		return -1
	}
	defer where.Close()
	err = where.In(func() (err error) {
		ttl, undo, err := o.mark(s.Key.address().Addr().Is4())
		defer undo()
		if err != nil {
			return err
		}
		q := s.question(n, ttl, []*steered{o})
		place, err = q.locate(ctx, silent)
		return err
	})
	if err != nil {
		return -1
	}
	return place
}

// A place is that of a Listener in a steering.
type place struct {
	*Steering
	inode uint32
}

// steeringOf returns the steering that directs clients away from listeners. It returns nil
// if that is not possible.
func steeringOf(ctx context.Context, drainings []*Draining) *Steering {
	var listeners []*Intake
	for _, d := range drainings {
		listeners = append(listeners, d.L)
		if isShared(d.L) {
			return nil // another holder may accept from the socket
		}
	}
	k, key, own, err := GroupOf(ctx, listeners)
	if err != nil {
		return nil
	}
	s := groupsOf(k).join(k, key, own)
	for i, l := range listeners {
		if former := l.Steering.Swap(&place{s, own[i].inode}); former != nil && former.Steering != s {
			former.leave(former.inode)
		}
	}
	return s
}

// isShared reports whether another holder has the socket, or may have it.
func isShared(in *Intake) bool {
	in.Mu.Lock()
	defer in.Mu.Unlock()
	return in.Shared
}

// leaveSteering ends the steering away from listeners, which let new clients in again.
func leaveSteering(listeners []*Intake) {
	left := make(map[*Steering][]uint32)
	for _, l := range listeners {
		if at := l.Steering.Swap(nil); at != nil {
			left[at.Steering] = append(left[at.Steering], at.inode)
		}
	}
	for s, inodes := range left {
		s.leave(inodes...)
	}
}

// forgetSteering removes a listener that is closed, or that was shut down.
func forgetSteering(l *Intake) {
	if at := l.Steering.Load(); at != nil {
		at.Groups.forget(at.Steering, false, at.inode)
	}
}

// alone calls f while no call is inside, and none can enter.
func (g *gate) alone(ln *net.TCPListener, f func()) {
	g.Mu.Lock()
	defer g.Mu.Unlock()
	for g.shut { // a drain has shut the gate
		g.moved.Wait()
	}
	g.sendOut(ln, 20*DrainLook, f)
}

// CloseListener closes l.
func (p *place) CloseListener(l *Intake) error {
	return p.close(p.inode, func() { hide(l) }, l.TCP.Close, func(f func()) { l.Gate.alone(l.TCP, f) })
}

// noDevice is the index of an interface that does not exist.
const noDevice = math.MaxInt32

// hide binds the socket to an interface that does not exist, right before the socket is
// closed. The kernel then finds the group through its other members only. Without hide a
// client may stall: close(2) removes a listener from its group a moment before it removes it
// from the table of listeners (inet_unhash in net/ipv4/inet_hashtables.c). If a SYN on another
// processor finds the listener at that moment, the kernel gives the SYN to it, whatever the
// program picks.
//
// Without CAP_NET_RAW nobody can undo this. So hide does nothing if the socket may have
// another holder. Kernels before 5.1 do not have the option. Those before 5.7 demand the
// capability, and so do all if the socket is bound to an interface already.
func hide(l *Intake) {
	if !l.Mu.TryLock() { // the other goroutine may wait for the turn in which this one closes
		return
	}
	defer l.Mu.Unlock()
	if !l.sole || l.Shared {
		return
	}
	l.Raw.Control(func(fd uintptr) {
		if stands(l.Calls, int(fd)) {
			l.hidden = l.Calls.SetInt(int(fd), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, noDevice) == nil
		}
	})
}

// GroupOf returns the group of listeners, and the listeners as a steering needs them.
func GroupOf(ctx context.Context, listeners []*Intake) (k *sys.Calls, key groupKey, own []*steered, err error) {
	for _, l := range listeners {
		if !l.Steers {
			return nil, key, nil, errors.ErrUnsupported
		}
		inode, err := inodeOf(l)
		if err != nil {
			return nil, key, nil, err
		}
		own = append(own, &steered{l.Raw, uint32(inode), func(v4 bool) (int, func(), error) {
			return markListener(l.Calls, l.Raw, l, v4)
		}})
	}
	k = listeners[0].Calls
	key, err = groupKeyOf(k, ctx, own[0], listeners[0].TCP.Addr().(*net.TCPAddr))
	return k, key, own, err
}

// groupKeyOf returns the key of the group of a listener at addr.
func groupKeyOf(k *sys.Calls, ctx context.Context, o *steered, addr *net.TCPAddr) (key groupKey, err error) {
	where, err := netns.NamespaceOfSocket(k, o.raw)
	if err != nil {
		return key, err
	}
	defer where.Close()
	err = where.In(func() error {
		rows, err := groupRows(k, ctx, familyOf(addr), uint16(addr.Port), o.inode)
		if err == nil {
			key = keyOf(rows[0])
		}
		return err
	})
	key.namespace = uint64(o.inode)
	o.raw.Control(func(fd uintptr) {
		if cookie, err := netns.CookieOf(k, int(fd)); err == nil {
			key.namespace = cookie
		}
	})
	return key, err
}

// Welcome prepares a group for listeners that have just joined it. A process that has ended
// can have left a program that does not know them. If all members answer, welcome detaches
// any program, and the kernel uses its hash. If some do not answer, they drain, and welcome
// attaches a program that picks the others.
func Welcome(ctx context.Context, listeners []*Intake) {
	if !listeners[0].Steers {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), steerWait)
	defer cancel()
	k, key, own, err := GroupOf(ctx, listeners)
	if err != nil {
		return
	}
	if s := groupsOf(k).of(key); s != nil { // this process drains other members
		if s.lock(ctx) != nil {
			return
		}
		s.refresh(ctx)()
		drains := len(s.draining()) > 0
		s.unlock()
		if drains {
			return
		}
	}
	s := &Steering{Calls: k, Groups: new(Groups), Key: key, Own: own, On: true}
	where, err := netns.NamespaceOfSocket(k, own[0].raw)
	if err != nil {
		return
	}
	defer where.Close()
	where.In(func() error {
		wait, cancel := context.WithTimeout(ctx, turnWait)
		defer cancel()
		defer takeTurn(k, wait, "question", key)()
		s.put(s.welcome(ctx))
		return nil
	})
}

// welcome returns the program for a group that own has just joined.
func (s *Steering) welcome(ctx context.Context) []unix.SockFilter {
	for range 2 { // one answer may be late
		listed, full, err := s.members(ctx, s.Own, 2)
		n := len(listed)
		if err != nil || n == len(s.Own) {
			return nil
		}
		q := s.question(n, commonTTL/2, nil)
		answers, err := q.ask(ctx)
		if err != nil || n-len(answers) <= full {
			return nil
		}
		s.answers, s.listed = answers, listed
	}
	// The newest members are the last. If they are silent, another member may serve too, for
	// example if all have a minimum TTL.
	n := len(s.listed)
	for i := n - len(s.Own); i < n; i++ {
		if !slices.Contains(s.answers, i) {
			return nil
		}
	}
	return picks(s.answers, n)
}
