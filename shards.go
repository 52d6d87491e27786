package acceptq

import (
	"context"
	"fmt"
	"iter"
	"net"
	"sync"
)

// Shards are several listeners on one address, each with an accept queue of its
// own, over which the kernel spreads new connections: n queues hold n times what
// the ceiling allows one. See [ListenShards].
//
// A method of zero Shards that returns an error returns one.
type Shards struct {
	listeners []*Listener
	closing   sync.Mutex // one Close at a time: Serve calls it too, when the first has closed one
}

// ListenTCPShards listens with n sockets on the TCP address addr, see
// [ListenShards].
func ListenTCPShards(addr string, n int, opts ...Option) (*Shards, error) {
	return ListenShards(context.Background(), "tcp", addr, n, opts...)
}

// ListenShards listens on a TCP address with n sockets, each made as [Listen]
// makes one with these options: WithBacklog is for each, and a port of 0 becomes
// one port for all. When one cannot be made, none is left.
//
// The shards are exclusive: a second process that listens on the address gets
// EADDRINUSE, unless it asks for SO_REUSEPORT itself, which on Linux the same
// user may. With [WithReusePort] the address can be shared on purpose. A
// [WithControl] function is called for each socket; on FreeBSD and DragonFly there
// is one more, which claims the address and is closed again.
//
// The kernel picks a shard by a hash of the addresses and ports and does not look
// whether its queue is full: a full shard turns clients away while its neighbour
// is empty. [Shards.All] shows each.
//
// It is an error if n is not positive. Where the system does not spread
// connections (see [WithReusePort]) and n is more than 1, the error matches
// [errors.ErrUnsupported]; on FreeBSD also if n is more than 256, the most that
// its kernel spreads over.
func ListenShards(ctx context.Context, network, address string, n int, opts ...Option) (*Shards, error) {
	return realSystem.shards(ctx, network, address, n, opts)
}

func (sys *system) shards(ctx context.Context, network, address string, n int, opts []Option) (*Shards, error) {
	o, err := checked(ctx, network, opts)
	if err == nil && n < 1 {
		err = fmt.Errorf("acceptq: %d shards", n)
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if n == 1 {
		l, err := sys.listen(ctx, network, address, o)
		if err != nil {
			return nil, err
		}
		return &Shards{listeners: []*Listener{l}}, nil
	}
	s := new(Shards) // n may be more than memory: descriptors run out first
	err = sys.listenShards(ctx, network, address, o, func(l *Listener) bool {
		s.listeners = append(s.listeners, l)
		return len(s.listeners) < n
	})
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Len returns the number of shards.
func (s *Shards) Len() int { return len(s.listeners) }

// All yields the shards in the order in which they were made.
func (s *Shards) All() iter.Seq[*Listener] {
	return func(yield func(*Listener) bool) {
		for _, l := range s.listeners {
			if !yield(l) {
				return
			}
		}
	}
}

// Addr returns the address of all shards; nil for zero Shards.
func (s *Shards) Addr() net.Addr {
	if len(s.listeners) == 0 {
		return nil
	}
	return s.listeners[0].Addr()
}

// EffectiveBacklog returns the sum of what [Listener.EffectiveBacklog] returns, in
// connections; -1 if one is unknown, and for zero Shards.
func (s *Shards) EffectiveBacklog() int {
	sum := sumOf(s.listeners, func(l *Listener) int64 { return int64(l.EffectiveBacklog()) })
	return saturate(sum)
}

// Stats reads all queues, one after the other, and returns the sums. A sum with
// an unknown part is unknown, which is -1. When a queue cannot be read the error
// is that of [Listener.Stats].
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
	if len(s.listeners) > 0 {
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Err: errNotListening}
}

// sumOf adds up one number of each; of none, and with an unknown one among them,
// it is unknown.
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

// SetBacklog calls [Listener.SetBacklog] with n for each shard, up to the first
// that fails, and returns its error.
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

// Close closes all shards and returns the first error.
func (s *Shards) Close() error {
	if err := s.none("close"); err != nil {
		return err
	}
	s.closing.Lock()
	defer s.closing.Unlock()
	var first error
	for _, l := range s.listeners {
		if err := l.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}
