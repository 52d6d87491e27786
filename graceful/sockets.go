package graceful

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"sync"

	"github.com/acceptq/acceptq"
)

// A socket can be drained: an *acceptq.Listener or *acceptq.Shards.
type socket interface {
	Drain(context.Context) error
	Stats() (acceptq.Stats, error)
}

// A door is a listener that is served, and the listener that the caller passed for it.
type door struct {
	given, served net.Listener
}

// A closer closes a listener only once. net/http closes the listener too, and some types
// do not support a second Close.
type closer struct {
	net.Listener
	once sync.Once
	err  error
}

func (c *closer) Close() error {
	c.once.Do(func() { c.err = c.Listener.Close() })
	return c.err
}

// open sets the listeners to serve and the sockets to drain.
func (s *server) open(listeners []Listener) error {
	for _, ln := range listeners {
		switch ln := ln.(type) {
		case *acceptq.Shards:
			for l := range ln.All() {
				s.doors = append(s.doors, door{l, l})
			}
			s.sockets = append(s.sockets, ln)
		case *net.TCPListener:
			l, err := acceptq.Wrap(ln)
			if err != nil {
				return err
			}
			s.doors = append(s.doors, door{ln, l})
			s.sockets = append(s.sockets, l)
		case net.Listener:
			s.doors = append(s.doors, door{ln, &closer{Listener: ln}})
			if l := below(ln); l != nil {
				s.sockets = append(s.sockets, l)
			}
		default:
			return fmt.Errorf("graceful: a %T is neither a net.Listener nor an *acceptq.Shards", ln)
		}
	}
	if len(s.doors) == 0 {
		return errors.New("graceful: no listener")
	}
	for _, l := range s.named {
		if !slices.Contains(s.sockets, socket(l)) {
			s.sockets = append(s.sockets, l)
		}
	}
	return nil
}

// below returns the acceptq.Listener that ln wraps, or nil if it finds none. A listener of
// crypto/tls, like most that wrap another one, has it in a field named Listener. If ln
// wraps a *net.TCPListener, it cannot be drained, because connections must be accepted by
// the methods of an acceptq.Listener.
func below(ln net.Listener) *acceptq.Listener {
	for range 16 { // the limit is for a listener that wraps itself
		if l, ok := ln.(*acceptq.Listener); ok {
			return l
		}
		v := reflect.Indirect(reflect.ValueOf(ln))
		if v.Kind() != reflect.Struct {
			return nil
		}
		f, ok := v.Type().FieldByName("Listener")
		if !ok || len(f.Index) != 1 {
			return nil
		}
		if ln, ok = v.Field(f.Index[0]).Interface().(net.Listener); !ok {
			return nil
		}
	}
	return nil
}

// drainAll drains all sockets and returns how many connections are left in their queues, or
// -1 if one of the numbers is unknown. It returns an error if a drain has not ended in time.
func (s *server) drainAll(ctx context.Context) (queued int, err error) {
	errs := make([]error, len(s.sockets))
	var wait sync.WaitGroup
	for i, l := range s.sockets {
		wait.Go(func() { errs[i] = l.Drain(ctx) })
	}
	wait.Wait()
	for _, drained := range errs {
		var left *acceptq.DrainError
		switch {
		case drained == nil:
		case errors.As(drained, &left):
			if left.Queued == 0 && left.InFlight <= 0 && left.HeldBack <= 0 && left.Accepted == 0 {
				continue // the drain has not ended, but no connection is known to be cut off
			}
			queued = plus(queued, left.Queued)
			err = errors.Join(err, drained)
		default:
			s.logger.InfoContext(ctx, "graceful: cannot keep new clients out", "error", drained)
		}
	}
	if err != nil && !errors.Is(err, context.Cause(ctx)) {
		err = errors.Join(context.Cause(ctx), err)
	}
	return queued, err
}

// plus adds two numbers of connections. The sum is unknown, -1, if one of them is.
func plus(a, b int) int {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}

// queued returns how many connections wait in the queues of all sockets. ok is false if
// that is unknown or if a socket is closed.
func (s *server) queued() (sum int, ok bool) {
	for _, l := range s.sockets {
		stats, err := l.Stats()
		if err != nil || stats.Queued < 0 {
			return 0, false
		}
		sum += stats.Queued
	}
	return sum, len(s.sockets) > 0
}

// closeAll closes the listeners. Shards know the order in which theirs are to close.
func (s *server) closeAll() {
	for _, l := range s.sockets {
		if shards, ok := l.(*acceptq.Shards); ok {
			shards.Close()
		}
	}
	for _, d := range s.doors {
		d.served.Close()
	}
}
