package graceful

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/acceptq/acceptq"
)

// A socket can be drained.
type socket struct {
	*acceptq.Listener
	once   sync.Once
	inode  uint64
	queued int // connections in the queue when it was closed
}

// note notes what close leaves behind.
func (k *socket) note() {
	k.once.Do(func() {
		k.inode = inodeOf(k.Listener)
		stats, err := k.Stats()
		switch {
		case err == nil:
			k.queued = stats.Queued
		case !errors.Is(err, net.ErrClosed):
			k.queued = -1
		}
	})
}

// A door is a listener that is served.
type door struct {
	net.Listener
	given  net.Listener // what the caller passed
	socket *socket      // nil if Listener shows none
	conns  *conns

	closing sync.Once
	err     error
	closed  chan struct{} // closed when the stop closes the door
	opening sync.Once
	open    chan struct{} // closed when Accept may return the error of the closed listener
	inside  atomic.Int32  // calls of Accept
	ending  sync.Once
	ended   chan struct{} // closed when no more connections come
}

// Accept does not return when the stop closes the listener, but later: the server would
// take the error for its end, and some servers then close connections before the first
// answer.
func (d *door) Accept() (net.Conn, error) {
	d.inside.Add(1)
	nc, err := d.Listener.Accept()
	if err == nil {
		nc = d.conns.accepted(nc)
	}
	d.inside.Add(-1)
	if err == nil {
		return nc, nil
	}
	select {
	case <-d.closed:
		d.end()
		<-d.open
	default:
	}
	return nil, err
}

// shut closes the listener once: some types do not support a second Close. The server
// calls Close.
func (d *door) shut() error {
	d.closing.Do(func() {
		if d.socket != nil {
			d.socket.note()
		}
		close(d.closed)
		d.err = d.Listener.Close()
	})
	return d.err
}

func (d *door) end() { d.ending.Do(func() { close(d.ended) }) }

// release lets Accept return the error of the closed listener.
func (d *door) release() { d.opening.Do(func() { close(d.open) }) }

func (d *door) Close() error {
	d.release()
	return d.shut()
}

// open sets the listeners to serve and the sockets to drain, each of them once.
func (s *server) open(listeners []Listener) error {
	for _, ln := range listeners {
		switch ln := ln.(type) {
		case *acceptq.Shards:
			for l := range ln.All() {
				s.add(l, l)
			}
		case *net.TCPListener:
			l, err := acceptq.Wrap(ln)
			if err != nil {
				return err
			}
			s.add(ln, l)
		case net.Listener:
			s.add(ln, ln)
		default:
			return fmt.Errorf("graceful: a %T is neither a net.Listener nor an *acceptq.Shards", ln)
		}
	}
	if len(s.doors) == 0 {
		return errors.New("graceful: no listener")
	}
	for _, l := range s.named {
		s.addSocket(l)
	}
	return nil
}

func (s *server) add(given, served net.Listener) {
	same := func(d *door) bool { return hashable(given) && hashable(d.given) && d.given == given }
	if slices.ContainsFunc(s.doors, same) {
		return
	}
	d := &door{
		Listener: served, given: given, conns: &s.conns,
		closed: make(chan struct{}), open: make(chan struct{}), ended: make(chan struct{}),
	}
	if l := below(served); l != nil {
		d.socket = s.addSocket(l)
	}
	s.doors = append(s.doors, d)
}

// addSocket adds a socket to the others with its address, which are drained together. They
// may be shards, whatever wraps each of them.
func (s *server) addSocket(l *acceptq.Listener) *socket {
	k := &socket{Listener: l}
	for i, group := range s.sockets {
		for _, other := range group {
			if other.Listener == l {
				return other
			}
		}
		if l.String() == group[0].String() {
			s.sockets[i] = append(group, k)
			return k
		}
	}
	s.sockets = append(s.sockets, []*socket{k})
	return k
}

// hashable reports whether v can be compared and can be the key of a map.
func hashable(v any) bool { return reflect.ValueOf(v).Comparable() }

// depth limits how many values wrap each other, because one may wrap itself.
const depth = 16

// below returns the acceptq.Listener that ln wraps, or nil if it finds none. A listener of
// crypto/tls, like most that wrap another one, has it in a field named Listener. If ln
// wraps a *net.TCPListener, it cannot be drained, because connections must be accepted by
// the methods of an acceptq.Listener.
func below(ln net.Listener) *acceptq.Listener {
	for range depth {
		if l, ok := ln.(*acceptq.Listener); ok || ln == nil {
			return l
		}
		ln = field[net.Listener](ln, "Listener")
	}
	return nil
}

// field returns the value of an exported field of the struct v or *v, or the zero value.
func field[T any](v any, name string) (value T) {
	s := reflect.Indirect(reflect.ValueOf(v))
	if s.Kind() != reflect.Struct {
		return value
	}
	if f, ok := s.Type().FieldByName(name); ok && len(f.Index) == 1 {
		value, _ = s.Field(f.Index[0]).Interface().(T)
	}
	return value
}

// drain drains all sockets and closes the doors at once: nothing follows a SO_REUSEPORT group
// after its drain, and where new clients are not kept out, they connect in between. It
// returns how many connections the kernel has reset, and why.
func (s *server) drain(ctx context.Context) (queued int, err error) {
	errs := make([]error, len(s.sockets))
	var wait sync.WaitGroup
	for i, group := range s.sockets {
		wait.Go(func() { errs[i] = drainAll(ctx, group) })
	}
	wait.Wait()
	s.shut(ctx)
	elsewhere := sync.OnceValue(listening)
	for i, group := range s.sockets {
		var left *acceptq.DrainError
		ended := !errors.As(errs[i], &left)
		lost, alive := 0, false
		for _, k := range group {
			lost = plus(lost, k.queued)
		}
		if lost != 0 || !ended {
			lost, alive = 0, true
			for _, k := range group {
				if !elsewhere()[k.inode] { // no other holder serves what is left
					lost = plus(lost, k.queued)
					alive = false
				}
			}
		}
		queued = plus(queued, lost)
		if ended && errs[i] != nil {
			s.log(ctx, slog.LevelInfo, "cannot keep new clients out", slog.Any("error", errs[i]))
		}
		// The drain of an empty socket may not have ended.
		rest := !ended && (left.Queued != 0 || left.InFlight > 0 || left.HeldBack > 0 || left.Accepted > 0)
		if lost != 0 || rest && !alive {
			err = join(err, cmp.Or(errs[i], errors.New("closed by other code")))
		}
	}
	return queued, err
}

func drainAll(ctx context.Context, group []*socket) error {
	listeners := make([]*acceptq.Listener, len(group))
	for i, k := range group {
		listeners[i] = k.Listener
	}
	return acceptq.DrainAll(ctx, listeners...)
}

// shut closes the doors, the last one first, as Shards.Close does.
func (s *server) shut(ctx context.Context) {
	for _, group := range s.sockets {
		for _, k := range group {
			k.note()
		}
	}
	call(ctx, func() {
		for _, d := range slices.Backward(s.doors) {
			d.shut()
		}
	})
}

// queued returns how many connections wait in the queues of all sockets. ok is false if
// that is unknown or if a socket is closed.
func (s *server) queued() (sum int, ok bool) {
	for _, group := range s.sockets {
		for _, k := range group {
			stats, err := k.Stats()
			if err != nil || stats.Queued < 0 {
				return 0, false
			}
			sum += stats.Queued
		}
	}
	return sum, len(s.sockets) > 0
}

// plus adds two numbers of connections. The sum is unknown, -1, if one of them is.
func plus(a, b int) int {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}
