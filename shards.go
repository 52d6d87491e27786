package acceptq

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
)

// Shards is a group of listeners on one address, each with its own accept queue. The
// kernel spreads new connections over them, so n queues can hold n times as many
// connections as the ceiling allows. [ListenShards] returns a Shards.
//
// On a zero or nil Shards every method that can return an error does.
type Shards struct {
	listeners []*Listener
	closing   sync.Mutex // allows one Close at a time: Serve calls it too
}

// ListenTCPShards listens on the TCP address addr with n sockets, see [ListenShards].
func ListenTCPShards(addr string, n int, opts ...Option) (*Shards, error) {
	return ListenShards(context.Background(), "tcp", addr, n, opts...)
}

// ListenShards listens on a TCP address with n sockets. Each socket is made as by
// [Listen] with these options, so [WithBacklog] applies to each. If the port is 0, all
// sockets get the same port. If one socket cannot be made, all are closed.
//
// Without [WithReusePort] the address is exclusive: another process that listens on it
// gets EADDRINUSE. The exception is a process that sets SO_REUSEPORT itself and whose
// user can join, see [WithReusePort]. The kernel may refuse a client because one shard is
// full while another is empty. [Shards.All] returns each shard.
//
// A function of [WithControl] is called for each socket. On FreeBSD and DragonFly there
// is one more socket, which reserves the address and is then closed.
//
// It is an error if n is not positive. The error matches [errors.ErrUnsupported]
//   - if n is greater than 1 and the system does not spread connections, see
//     [WithReusePort]
//   - if n is greater than the number of sockets over which the kernel spreads
//     connections: 256 on FreeBSD, 128 on DragonFly
func ListenShards(ctx context.Context, network, address string, n int, opts ...Option) (*Shards, error) {
	return listenShards(&sys.Real, ctx, network, address, n, opts)
}

func listenShards(k *sys.Calls, ctx context.Context, network, address string, n int, opts []Option) (*Shards, error) {
	o, err := checked(ctx, network, opts)
	if err == nil && n < 1 {
		err = fmt.Errorf("ListenShards(%d): not positive", n)
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if n == 1 {
		l, err := makeListener(k, ctx, network, address, o)
		if err != nil {
			return nil, err
		}
		return &Shards{listeners: []*Listener{l}}, nil
	}
	s := new(Shards) // without room for n: n may be too large, and descriptors run out first
	err = makeShards(k, ctx, network, address, o, func(l *Listener) bool {
		s.listeners = append(s.listeners, l)
		return len(s.listeners) < n
	})
	if err != nil {
		s.Close()
		return nil, err
	}
	intake.Welcome(ctx, intakes(s.listeners))
	return s, nil
}

// Len returns the number of shards.
func (s *Shards) Len() int { return len(s.all()) }

// All returns an iterator over the shards in the order in which they were made.
func (s *Shards) All() iter.Seq[*Listener] { return slices.Values(s.all()) }

func (s *Shards) all() []*Listener {
	if s == nil {
		return nil
	}
	return s.listeners
}

// Addr returns the address of the shards. It returns nil for a zero Shards.
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

// EffectiveBacklog returns how many connections may wait in all queues together: the sum of
// [Listener.EffectiveBacklog] over all shards. It returns -1 if one of them is unknown, and
// for a zero Shards. For how many wait now, see [Shards.Stats].
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

// Backlogs holds the accounts of several accept queues. It is one line in a log and an
// array in JSON.
type Backlogs []Backlog

// String returns one line with the capacity of all queues and the account of each. Equal
// accounts appear once.
func (bs Backlogs) String() string {
	switch len(bs) {
	case 0:
		return logSubject + nothingKnown
	case 1:
		return bs[0].String()
	}
	queues := make(map[Backlog]int)
	for _, b := range bs {
		queues[b]++
	}
	var line strings.Builder
	fmt.Fprintf(&line, logSubject+"%d queues hold %v", len(bs), count(bs.sum(func(b Backlog) int { return b.Capacity })))
	if len(queues) == 1 {
		fmt.Fprintf(&line, ", each: %v", bs[0].describe())
		return line.String()
	}
	for _, b := range bs {
		if n := queues[b]; n > 0 {
			fmt.Fprintf(&line, "; %d: %v", n, b.describe())
			queues[b] = 0
		}
	}
	return line.String()
}

// LogValue returns a group for [log/slog]: the number of queues, the ceiling, and the
// sums of the other numbers. "measured" is true if all limits were read from the socket.
// "clamped" is true if at least one limit was clamped. LogValue omits unknown numbers and
// sums with an unknown part.
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

// Stats reads all queues, one after the other, and returns the sums, and the fullest shard
// in Fullest. A sum with an unknown part is -1. If a queue cannot be read, Stats returns
// the error of [Listener.Stats].
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
		Fullest:    fullest(all),
	}, nil
}

// fullest returns the element with the highest utilization. It returns nil if there are
// not several elements, or if one of them may be full without a sign of it.
func fullest(all []Stats) (most *Stats) {
	if len(all) < 2 {
		return nil
	}
	highest := -1.0
	for i, s := range all {
		part, known := s.Utilization()
		if !known {
			return nil
		}
		if part > highest {
			most, highest = &all[i], part
		}
	}
	return most
}

// none returns the error of a zero Shards.
func (s *Shards) none(op string) error {
	if s.Len() > 0 {
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Err: sys.ErrNotListening}
}

// sumOf adds up one number of each element. The sum is unknown if there is no element or
// if one number is unknown.
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

// SetBacklog changes the backlog of each shard to n connections, see
// [Listener.SetBacklog], and returns the new accounts, as [Shards.Backlogs] does. If that
// fails for a shard, SetBacklog does not change the shards after it and returns the error,
// with the current account of each shard.
func (s *Shards) SetBacklog(n int) (Backlogs, error) {
	if err := s.none("listen"); err != nil {
		return nil, err
	}
	for _, l := range s.listeners {
		if _, err := l.SetBacklog(n); err != nil {
			return s.Backlogs(), err
		}
	}
	return s.Backlogs(), nil
}

// Serve calls serve for each shard, each in its own goroutine, as in
// shards.Serve(server.Serve). When one call returns, Serve closes all shards, because
// the kernel assigns clients even to a shard that is no longer served. Serve returns
// when all calls have returned. It returns the first error unchanged.
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

// Drain drains all shards together, see [Listener.Drain]. The numbers in a [DrainError]
// are sums over all shards. A shard that is closed needs no drain.
func (s *Shards) Drain(ctx context.Context) error {
	if err := s.none("drain"); err != nil {
		return err
	}
	return drainAll(ctx, s.listeners)
}

// Resume undoes a drain of all shards that are not closed, see [Listener.Resume].
func (s *Shards) Resume() error {
	if err := s.none("resume"); err != nil {
		return err
	}
	errs := resumeAll(s.listeners)
	open := slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return errors.Is(err, net.ErrClosed) })
	if len(open) == 0 {
		return errs[0]
	}
	return intake.Join(open)
}

// Close closes all shards, the last one first, and returns the first error.
func (s *Shards) Close() error {
	if err := s.none("close"); err != nil {
		return err
	}
	s.closing.Lock()
	defer s.closing.Unlock()
	var first error
	for _, l := range slices.Backward(s.listeners) {
		if err := l.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// DrainAll drains listeners of one address together, as [Shards.Drain] does. It is for
// listeners that were wrapped one by one. The numbers in a [DrainError] are sums.
func DrainAll(ctx context.Context, listeners ...*Listener) error {
	return (&Shards{listeners: listeners}).Drain(ctx)
}
