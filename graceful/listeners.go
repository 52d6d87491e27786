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
	"github.com/acceptq/acceptq/internal/unwrap"
)

// A door is a listener that is served.
type door struct {
	net.Listener
	given  net.Listener // what the caller passed
	conns  *conns
	shut   func() error // closes Listener once: some types do not support a second Close
	inside atomic.Int32 // calls of Accept

	shutting event // the listener is being closed
	ended    event // no more connections come
	released event // Accept may return the error of the closed listener
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
	if err != nil && d.shutting.happened() {
		d.ended.happen()
		<-d.released.Done()
	}
	return nc, err
}

// Close is called by the server.
func (d *door) Close() error {
	d.released.happen()
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
	// A listener that wraps a *net.TCPListener cannot be drained, because connections must be
	// accepted by the methods of an acceptq.Listener.
	l := unwrap.Listener[*acceptq.Listener](served)
	if l != nil {
		s.addSocket(l)
	}
	d := &door{Listener: served, given: given, conns: &s.conns, shutting: newEvent(), ended: newEvent(), released: newEvent()}
	d.shut = sync.OnceValue(func() error {
		if l != nil {
			s.note(l)
		}
		d.shutting.happen()
		return d.Listener.Close()
	})
	s.doors = append(s.doors, d)
}

// addSocket adds a socket to the others with its address, which are drained together. They
// may be shards, whatever wraps each of them.
func (s *server) addSocket(l *acceptq.Listener) {
	for i, group := range s.sockets {
		if group[0].String() == l.String() {
			if !slices.Contains(group, l) {
				s.sockets[i] = append(group, l)
			}
			return
		}
	}
	s.sockets = append(s.sockets, []*acceptq.Listener{l})
}

// A remainder is what a socket leaves behind when it is closed.
type remainder struct {
	queued int // connections in the queue
	inode  uint64
}

// note notes what a socket leaves behind. It is called each time before the socket may be
// closed, and the first call counts.
func (s *server) note(l *acceptq.Listener) {
	stats, err := l.Stats()
	switch {
	case errors.Is(err, net.ErrClosed):
		stats.Queued = 0
	case err != nil:
		stats.Queued = -1
	}
	s.remains.LoadOrStore(l, remainder{stats.Queued, inodeOf(l)})
}

// hashable reports whether v can be compared and can be the key of a map.
func hashable(v any) bool { return reflect.ValueOf(v).Comparable() }

// drain drains all sockets and closes the doors at once: nothing follows a SO_REUSEPORT group
// after its drain, and where new clients are not kept out, they connect in between. It
// returns how many connections the kernel has reset, and why.
func (s *server) drain(ctx context.Context) (queued int, err error) {
	errs := make([]error, len(s.sockets))
	var wait sync.WaitGroup
	for i, group := range s.sockets {
		wait.Go(func() { errs[i] = acceptq.DrainAll(ctx, group...) })
	}
	wait.Wait()
	s.shut(ctx)
	elsewhere := sync.OnceValue(listening)
	for i, group := range s.sockets {
		var left *acceptq.DrainError
		ended := !errors.As(errs[i], &left)
		if ended && errs[i] != nil {
			s.log(slog.LevelInfo, "cannot keep new clients out", slog.Any("error", errs[i]))
		}
		// The drain of an empty socket may not have ended.
		rest := !ended && (left.Queued != 0 || left.InFlight > 0 || left.HeldBack > 0 || left.Accepted > 0)
		cut := false
		for _, l := range group {
			v, _ := s.remains.Load(l)
			r := v.(remainder)
			if (rest || r.queued != 0) && !elsewhere()[r.inode] { // no other holder serves what is left
				queued, cut = plus(queued, r.queued), true
			}
		}
		if cut {
			err = join(err, cmp.Or(errs[i], errors.New("closed by other code")))
		}
	}
	return queued, err
}

// shut closes the doors, the last one first, as Shards.Close does.
func (s *server) shut(ctx context.Context) {
	for _, l := range slices.Concat(s.sockets...) {
		s.note(l)
	}
	call(ctx, func() {
		for _, d := range slices.Backward(s.doors) {
			d.shut()
		}
	})
}

// queued returns how many connections wait in the queues of all sockets. It returns -1 if that
// is unknown or if a socket is closed.
func (s *server) queued() (sum int) {
	if len(s.sockets) == 0 {
		return -1
	}
	for _, l := range slices.Concat(s.sockets...) {
		stats, err := l.Stats()
		if err != nil {
			return -1
		}
		sum = plus(sum, stats.Queued)
	}
	return sum
}

// plus adds two numbers of connections. The sum is unknown, -1, if one of them is.
func plus(a, b int) int {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}
