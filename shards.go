package acceptq

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
)

// Shards are several listeners on one address, each with its own accept queue. The
// kernel spreads new connections over them, so that n queues hold n times what the
// ceiling allows one. See [ListenShards].
//
// On zero or nil Shards every method that can return an error does.
type Shards struct {
	listeners []*Listener
	closing   sync.Mutex // one Close at a time: Serve calls it too, when the first has closed one
}

// ListenTCPShards listens with n sockets on the TCP address addr, see
// [ListenShards].
func ListenTCPShards(addr string, n int, opts ...Option) (*Shards, error) {
	return ListenShards(context.Background(), "tcp", addr, n, opts...)
}

// ListenShards listens on a TCP address with n sockets, each made as [Listen] makes
// one with these options. WithBacklog applies to each socket, and a port of 0 becomes
// the same port for all. If one socket cannot be made, none is left.
//
// The shards are exclusive: a second process that listens on the address gets
// EADDRINUSE, unless it sets SO_REUSEPORT itself: [WithReusePort] says which users may.
// With [WithReusePort] the address can be shared on purpose. A [WithControl] function is
// called for each socket; on FreeBSD and DragonFly there is one more, which claims the
// address and is closed again.
//
// The kernel chooses a shard by a hash of the addresses and ports, even if its queue is
// full: a full shard turns clients away while another is empty. [Shards.All] shows
// each.
//
// It is an error if n is not positive. If n is more than 1 and the system does not
// spread connections (see [WithReusePort]), the error matches [errors.ErrUnsupported].
// On FreeBSD and DragonFly so does the error if n is more than 256, the maximum of their
// kernels.
func ListenShards(ctx context.Context, network, address string, n int, opts ...Option) (*Shards, error) {
	return realKernel.shards(ctx, network, address, n, opts)
}

func (k *kernel) shards(ctx context.Context, network, address string, n int, opts []Option) (*Shards, error) {
	o, err := checked(ctx, network, opts)
	if err == nil && n < 1 {
		err = fmt.Errorf("acceptq: %d shards", n)
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if n == 1 {
		l, err := k.listen(ctx, network, address, o)
		if err != nil {
			return nil, err
		}
		return &Shards{listeners: []*Listener{l}}, nil
	}
	s := new(Shards) // n may be more than memory: descriptors run out first
	err = k.listenShards(ctx, network, address, o, func(l *Listener) bool {
		s.listeners = append(s.listeners, l)
		return len(s.listeners) < n
	})
	if err != nil {
		s.Close()
		return nil, err
	}
	last := s.listeners[n-1]
	last.group.note(ctx, last)
	return s, nil
}

// Len returns the number of shards.
func (s *Shards) Len() int { return len(s.all()) }

// All yields the shards in the order in which they were made.
func (s *Shards) All() iter.Seq[*Listener] { return slices.Values(s.all()) }

func (s *Shards) all() []*Listener {
	if s == nil {
		return nil
	}
	return s.listeners
}

// Addr returns the address of all shards; nil for zero Shards.
func (s *Shards) Addr() net.Addr {
	for l := range s.All() {
		return l.Addr()
	}
	return nil
}

// String returns the network, the address and the number of shards, as in
// "tcp 127.0.0.1:8080, 4 shards".
func (s *Shards) String() string {
	if s.Len() == 0 {
		return "tcp <nil>, no shards"
	}
	return fmt.Sprintf("%v, %d shards", s.listeners[0], s.Len())
}

// EffectiveBacklog returns the sum of [Listener.EffectiveBacklog] over all shards, in
// connections; -1 if one is unknown, and for zero Shards.
func (s *Shards) EffectiveBacklog() int {
	sum := sumOf(s.all(), func(l *Listener) int64 { return int64(l.EffectiveBacklog()) })
	return saturate(sum)
}

// Backlogs returns the account of each shard, see [Listener.Backlog], in the order of
// [Shards.All].
func (s *Shards) Backlogs() Backlogs {
	var all Backlogs
	for l := range s.All() {
		all = append(all, l.Backlog())
	}
	return all
}

// Backlogs are the accounts of several accept queues. They are one line in a log and
// an array in JSON.
type Backlogs []Backlog

// String returns in one line how many connections all queues hold, and the account of
// each. Queues with the same account share it.
func (bs Backlogs) String() string {
	switch len(bs) {
	case 0:
		return nothingKnown
	case 1:
		return bs[0].String()
	}
	queues := make(map[Backlog]int)
	for _, b := range bs {
		queues[b]++
	}
	var line strings.Builder
	fmt.Fprintf(&line, "%d queues hold %v", len(bs), count(bs.sum(func(b Backlog) int { return b.Capacity })))
	if len(queues) == 1 {
		fmt.Fprintf(&line, ", each: %v", bs[0])
		return line.String()
	}
	for _, b := range bs {
		if n := queues[b]; n > 0 {
			fmt.Fprintf(&line, "; %d: %v", n, b)
			queues[b] = 0
		}
	}
	return line.String()
}

// LogValue returns a group for [log/slog]: the number of queues, the ceiling, and the
// sums of the other numbers. Measured is true if all were, and clamped if one was. An
// unknown number is left out, and so is a sum with an unknown part.
func (bs Backlogs) LogValue() slog.Value {
	ceiling, measured, clamped := unknown, len(bs) > 0, false
	for _, b := range bs {
		ceiling = orNothing(b, noBacklog).Ceiling
		measured = measured && b.Measured
		clamped = clamped || b.Clamped()
	}
	return logKnown(
		slog.Int("queues", len(bs)),
		slog.Int("requested", bs.sum(func(b Backlog) int { return b.Requested })),
		slog.Int("ceiling", ceiling),
		slog.Int("limit", bs.sum(func(b Backlog) int { return b.Limit })),
		slog.Int("effective", bs.sum(func(b Backlog) int { return b.Effective })),
		slog.Int("capacity", bs.sum(func(b Backlog) int { return b.Capacity })),
		slog.Bool("measured", measured),
		slog.Bool("clamped", clamped),
	)
}

func (bs Backlogs) sum(number func(Backlog) int) int {
	return saturate(sumOf(bs, func(b Backlog) int64 { return int64(number(orNothing(b, noBacklog))) }))
}

// Stats reads all queues, one after the other, and returns the sums. A sum with an
// unknown part is unknown (-1). If a queue cannot be read, the error is that of
// [Listener.Stats].
func (s *Shards) Stats() (Stats, error) {
	if err := s.none("stats"); err != nil {
		return noStats, err
	}
	all := make([]Stats, len(s.listeners))
	for i, l := range s.listeners {
		var err error
		if all[i], err = l.Stats(); err != nil {
			return noStats, err
		}
	}
	return Stats{
		Queued:     saturate(sumOf(all, func(s Stats) int64 { return int64(s.Queued) })),
		Incomplete: saturate(sumOf(all, func(s Stats) int64 { return int64(s.Incomplete) })),
		Limit:      saturate(sumOf(all, func(s Stats) int64 { return int64(s.Limit) })),
		Capacity:   saturate(sumOf(all, func(s Stats) int64 { return int64(s.Capacity) })),
		Drops:      sumOf(all, func(s Stats) int64 { return s.Drops }),
	}, nil
}

// none is the error of zero Shards.
func (s *Shards) none(op string) error {
	if s.Len() > 0 {
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Err: errNotListening}
}

// sumOf adds up one number of each. The sum is unknown if there is none, or if one is
// unknown.
func sumOf[T any](all []T, number func(T) int64) int64 {
	if len(all) == 0 {
		return unknown
	}
	var sum int64
	for _, v := range all {
		n := number(v)
		if n == unknown {
			return unknown
		}
		sum += n
	}
	return sum
}

// SetBacklog calls [Listener.SetBacklog] with n for each shard. It stops at the first
// that fails and returns its error.
func (s *Shards) SetBacklog(n int) error {
	if err := s.none("listen"); err != nil {
		return err
	}
	for _, l := range s.listeners {
		if _, err := l.SetBacklog(n); err != nil {
			return err
		}
	}
	return nil
}

// Serve runs serve for each shard, as in shards.Serve(server.Serve), and returns
// when all have returned, with the first error as it is. When one returns, all
// shards are closed, as a server's only listener would be: a shard that nobody
// serves would still be given its part of the clients.
func (s *Shards) Serve(serve func(net.Listener) error) error {
	if err := s.none("accept"); err != nil {
		return err
	}
	var (
		wait  sync.WaitGroup
		once  sync.Once
		first error
	)
	for _, l := range s.listeners {
		wait.Go(func() {
			err := serve(l)
			once.Do(func() {
				first = err
				s.Close()
			})
		})
	}
	wait.Wait()
	return first
}

// Drain drains all shards together, see [Listener.Drain]. The numbers of a
// [DrainError] are sums.
func (s *Shards) Drain(ctx context.Context) error {
	if err := s.none("drain"); err != nil {
		return err
	}
	return drain(ctx, s.listeners)
}

// Resume undoes a drain of all shards, see [Listener.Resume].
func (s *Shards) Resume() error {
	if err := s.none("resume"); err != nil {
		return err
	}
	errs := make([]error, len(s.listeners))
	for i, l := range s.listeners {
		errs[i] = l.Resume()
	}
	return join(errs)
}

// Close closes all shards, the last one first, and returns the first error.
func (s *Shards) Close() error {
	if err := s.none("close"); err != nil {
		return err
	}
	s.closing.Lock()
	defer s.closing.Unlock()
	var first error
	for _, l := range closingOrder(s.listeners) {
		if err := l.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}
