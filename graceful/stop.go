package graceful

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
)

// A Listener is what a server accepts connections from: a [net.Listener] or an
// [*acceptq.Shards].
type Listener interface {
	Addr() net.Addr
	Close() error
}

// A server is a server of any kind while it is served.
type server struct {
	*options
	conns    conns
	doors    []*door
	sockets  [][]*acceptq.Listener // by address
	remains  sync.Map              // remainder by socket
	returned event                 // all calls of serve have returned

	// How to use the server.
	serve    func(net.Listener) error
	shutdown func(context.Context) // ends the connections, or tells them to end
	cut      func()                // closes the server at once
	closed   func() bool           // reports whether other code has closed the server
}

// start begins to serve if nothing is wrong. prepare may change the server to be served.
func (s *server) start(ctx context.Context, ln Listener, opts []Option, prepare func() error) error {
	o, err := newOptions(opts, s.conns.raw)
	s.options = o
	listeners := append([]Listener{ln}, o.listeners...)
	if err == nil && ctx == nil {
		err = errors.New("graceful: nil context")
	}
	if err == nil {
		err = s.open(listeners)
	}
	if err == nil {
		err = prepare()
	}
	if err != nil {
		for _, ln := range listeners {
			if ln != nil {
				ln.Close()
			}
		}
		return err
	}
	return s.run(ctx)
}

// run serves until ctx ends, and then stops the server.
func (s *server) run(ctx context.Context) error {
	results := make(chan error, len(s.doors))
	s.returned = newEvent()
	var serving atomic.Int64
	serving.Store(int64(len(s.doors)))
	for _, d := range s.doors {
		go func() {
			err := s.serve(d)
			d.Close() // ServeTLS does not if it lacks a certificate
			d.ended.happen()
			results <- err
			if serving.Add(-1) == 0 {
				s.returned.happen()
			}
		}()
	}
	var failed error
	select {
	case <-ctx.Done():
	case <-s.abort.Done():
	case failed = <-results:
		if s.closed() {
			for _, d := range s.doors {
				go d.Close()
			}
			return failed
		}
		s.log(slog.LevelError, "serving ended", slog.Any("error", failed))
	}
	cut, ended := s.stop(results)
	return join(join(failed, ended), cut)
}

// stop runs the phases. It runs every phase, even if the context has ended: the phase then
// only counts what it would have waited for. It returns what was cut off, and an error of
// serve that came before the stop had ended the listeners.
func (s *server) stop(results <-chan error) (cut, failed error) {
	end := time.Now().Add(s.total)
	all, cancel := context.WithDeadline(s.abort, end)
	defer cancel()
	if len(s.signals) > 0 {
		all, cancel = signal.NotifyContext(all, s.signals...)
		defer cancel()
	}

	// Each phase may use what the reserve of the later ones leaves of the time.
	part := s.part
	var errs error
	phase := func(name string, limit, reserve time.Duration, f func(context.Context) error) {
		began := time.Now()
		ctx, cancel := context.WithDeadline(all, end.Add(-reserve))
		defer cancel()
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
		err := f(ctx)
		took := slog.Duration("took", time.Since(began))
		if err == nil {
			s.log(slog.LevelInfo, name, took)
			return
		}
		errs = join(errs, fmt.Errorf("%s: %w", name, err))
		s.log(slog.LevelWarn, name, took, slog.Any("error", err))
	}

	s.log(slog.LevelInfo, "stopping")
	if s.onStop != nil || s.delay > 0 {
		phase("delayed", s.total, s.linger+part, func(ctx context.Context) error {
			if s.onStop != nil && !call(ctx, s.onStop) {
				return fmt.Errorf("the function of WithOnStop has not returned: %w", context.Cause(ctx))
			}
			ctx, cancel := context.WithTimeout(ctx, s.delay)
			defer cancel()
			<-ctx.Done()
			return nil
		})
	}

	s.conns.stopping.Store(true)
	var e Error
	if s.shared {
		s.shut(all)
	}
	phase("idle closed", 2*s.linger+grace, part, func(ctx context.Context) error {
		s.await(ctx, func(n counts) bool { return n.in(idle, finishing) == 0 })
		return nil
	})
	if !s.shared {
		phase("drained", s.total, part/2, func(ctx context.Context) (err error) {
			e.Queued, err = s.drainWhileItMoves(ctx)
			return err
		})
	}
	phase("first requests", part, part/4, func(ctx context.Context) error {
		if s.await(ctx, func(n counts) bool {
			return n.in(fresh, greeted, arriving, finishing, idle) == 0 && s.accepting() == 0
		}) {
			return nil
		}
		// Accept of a closed listener returns soon, unless it holds a connection that it reads from.
		short, cancel := context.WithTimeout(context.Background(), grace)
		defer cancel()
		s.await(short, func(counts) bool { return s.accepting() == 0 })
		e.BeforeFirstAnswer = s.accepting()
		if s.conns.raw { // a server may take long for its first answer
			s.conns.close((*conn).silent)
		} else {
			e.BeforeFirstAnswer += s.conns.close(isIn(fresh))
			e.Active = s.conns.close(isIn(arriving))
		}
		if e.BeforeFirstAnswer+e.Active > 0 {
			return context.Cause(ctx)
		}
		return nil
	})
	for range len(results) { // an error that comes later is that of a closed listener
		if err := <-results; !errors.Is(err, net.ErrClosed) && !errors.Is(err, http.ErrServerClosed) {
			failed = err
		}
	}
	if s.closed() {
		failed = http.ErrServerClosed
	}
	phase("shut down", s.total, 0, func(ctx context.Context) error {
		down := newEvent()
		go func() {
			defer down.happen()
			s.shutdown(ctx)
		}()
		for _, d := range s.doors {
			d.released.happen()
		}
		left := func(n counts) int {
			if s.conns.raw {
				return n.open()
			}
			return n.in(fresh, active, finishing)
		}
		if s.await(ctx, func(n counts) bool { return left(n) == 0 && down.happened() && s.returned.happened() }) {
			return nil
		}
		n := s.conns.look(s.linger)
		s.conns.close(func(*conn) bool { return true })
		returned := call(ctx, func() {
			s.cut()
			<-s.returned.Done()
		})
		e.BeforeFirstAnswer += n[fresh]
		e.Active += left(n) - n[fresh]
		switch {
		case left(n) > 0:
			return context.Cause(ctx)
		case !returned && s.accepting() == 0:
			return fmt.Errorf("the server has not returned: %w", context.Cause(ctx))
		}
		return nil
	})
	if n := int(s.conns.cut.Load()); n > 0 {
		e.Active += n
		errs = join(errs, fmt.Errorf("other code closed the server: %w", http.ErrServerClosed))
	}
	if e.err = errs; e.err == nil {
		return nil, failed
	}
	return &e, failed
}

// drainWhileItMoves drains the listeners. It gives up when for a while no connection has
// left the queues and no request was being answered.
func (s *server) drainWhileItMoves(ctx context.Context) (queued int, err error) {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	done := newEvent()
	go func() {
		defer done.happen()
		queued, err = s.drain(reasons{ctx})
	}()
	last, moved, squeezed := 0, time.Now(), false
	s.await(ctx, func(n counts) bool {
		now := s.queued()
		if 0 <= now && now < last || n[active] > 0 {
			moved = time.Now()
		}
		last = now
		if time.Since(moved) > s.part {
			if squeezed {
				giveUp(context.DeadlineExceeded)
			}
			// Accept may wait until connections end, as that of netutil.LimitListener does.
			squeezed, moved = true, time.Now()
			s.conns.close((*conn).silent)
		}
		return done.happened()
	})
	<-done.Done()
	return queued, err
}

// reasons is a context whose error is its cause, so that the error of a drain tells it.
type reasons struct{ context.Context }

func (r reasons) Err() error {
	if r.Context.Err() == nil {
		return nil
	}
	return context.Cause(r.Context)
}

// accepting returns how many listeners may hold a connection that conns does not have. net/http
// adds one after Accept, but before it calls Accept again.
func (s *server) accepting() (n int) {
	for _, d := range s.doors {
		if !d.ended.happened() && (!s.conns.raw || d.inside.Load() > 0) {
			n++
		}
	}
	return n
}

// await looks at the connections until done returns true or ctx ends.
func (s *server) await(ctx context.Context, done func(counts) bool) bool {
	for {
		n := s.conns.look(s.linger)
		if done(n) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(look + time.Duration(n.open())*time.Microsecond):
		}
	}
}

const (
	look = 2 * time.Millisecond // how often the stop looks at the connections, if they are few
	// grace is how long code of others may take after the time of the stop has ended.
	grace = 100 * time.Millisecond
)

// call calls f, which is code of others, and waits until it returns, but not longer than
// ctx and the grace.
func call(ctx context.Context, f func()) (returned bool) {
	done := newEvent()
	go func() {
		defer done.happen()
		f()
	}()
	select {
	case <-done.Done():
	case <-ctx.Done():
		select {
		case <-done.Done():
		case <-time.After(grace):
		}
	}
	return done.happened()
}

// An event happens once.
type event struct {
	context.Context
	happen func()
}

func newEvent() event {
	ctx, happen := context.WithCancel(context.Background())
	return event{ctx, happen}
}

func (e event) happened() bool { return e.Err() != nil }

// join joins two errors on one line.
func join(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return fmt.Errorf("%w; %w", a, b)
}

func (s *server) log(level slog.Level, text string, attrs ...slog.Attr) {
	if queued := s.queued(); queued >= 0 {
		attrs = append(attrs, slog.Int("queued", queued))
	}
	n := s.conns.look(s.linger)
	attrs = append(attrs,
		slog.Int("before_first_answer", n[fresh]),
		slog.Int("active", n.in(active, finishing, arriving)),
		slog.Int("idle", n.in(idle, rested, greeted)))
	short, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	call(short, func() { s.logger.LogAttrs(short, level, "graceful: "+text, attrs...) })
}
