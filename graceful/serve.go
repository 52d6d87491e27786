package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"
)

// A Listener is what a server is served on: a [net.Listener] or an
// [*acceptq.Shards].
type Listener interface {
	Addr() net.Addr
	Close() error
}

// Serve serves srv on ln until ctx ends, and then stops it without losing a
// request, in the phases that the package comment describes. It returns nil when
// nothing was cut off. It closes ln in every case.
//
// The error is or wraps
//   - an [*Error], when a time limit ended a phase or the stop was aborted, and
//     requests or connections were cut off
//   - the error of Accept, when that ended the serving. The server is stopped in the
//     same phases, so that the requests that it has are answered
//   - [http.ErrServerClosed], when srv was closed or shut down by other code. Serve
//     then returns at once, as [http.Server.Serve] does
//
// ln can be a [net.Listener] of any type. A listener of package acceptq is drained,
// also below one of crypto/tls or of a PROXY protocol package, see [WithSocket]. A
// [*net.TCPListener] is served by way of [acceptq.Wrap]. One that cannot be drained
// is closed in that phase, and connections that wait in its queue are reset.
//
// srv must not be serving yet. Serving the same server twice is an error.
func Serve(ctx context.Context, srv *http.Server, ln Listener, opts ...Option) error {
	return serve(ctx, srv, ln, srv.Serve, opts)
}

// ServeTLS is like [Serve], for HTTPS: it serves as [http.Server.ServeTLS] does.
// The file names are "" if srv.TLSConfig has the certificate.
func ServeTLS(ctx context.Context, srv *http.Server, ln Listener, certFile, keyFile string, opts ...Option) error {
	return serve(ctx, srv, ln, func(ln net.Listener) error { return srv.ServeTLS(ln, certFile, keyFile) }, opts)
}

// A server is an http.Server that is being served, and what of it was replaced.
type server struct {
	*options
	srv      *http.Server
	conns    conns
	stopping atomic.Bool // clients are turned away
	sockets  []socket
	doors    []door
	user     struct {
		handler     http.Handler
		noOptions   bool
		connState   func(net.Conn, http.ConnState)
		connContext func(context.Context, net.Conn) context.Context
		baseContext func(net.Listener) context.Context
		tlsConfig   *tls.Config
		nextProto   map[string]func(*http.Server, *tls.Conn, http.Handler)
	}
}

// serving holds the servers that are being served.
var serving struct {
	sync.Mutex
	servers map[*http.Server]*server
}

var errTwice = errors.New("graceful: the server is being served already")

func serve(ctx context.Context, srv *http.Server, ln Listener, serve func(net.Listener) error, opts []Option) error {
	o, err := newOptions(opts)
	listeners := append([]Listener{ln}, o.listeners...)
	if err == nil && (ctx == nil || srv == nil) {
		err = errors.New("graceful: nil context or server")
	}
	s := &server{options: o, srv: srv}
	if err == nil {
		err = s.open(listeners)
	}
	if err != nil {
		for _, ln := range listeners {
			if ln != nil {
				ln.Close()
			}
		}
		return err
	}
	defer s.closeAll()
	s.conns.all = make(map[net.Conn]*conn)
	s.conns.changed = make(chan struct{}, 1)
	s.conns.noLoops = make(chan struct{})

	serving.Lock()
	twice := serving.servers[srv] != nil
	if !twice {
		if serving.servers == nil {
			serving.servers = make(map[*http.Server]*server)
		}
		serving.servers[srv] = s
	}
	serving.Unlock()
	if twice {
		return errTwice
	}
	s.replace()
	s.conns.loops = len(s.doors)
	restored := make(chan struct{})
	wait := true
	defer func() {
		s.conns.whenEnded(func() {
			s.restore()
			serving.Lock()
			delete(serving.servers, srv)
			serving.Unlock()
			close(restored)
		})
		if wait {
			// Every connection is closed by now: this takes a moment, unless a
			// function of the user hangs. Then the last connection restores.
			select {
			case <-restored:
			case <-time.After(time.Second):
			}
		}
	}()

	results := make(chan error, len(s.doors))
	for _, d := range s.doors {
		go func() {
			defer s.conns.loopEnded()
			err := serve(d.served)
			d.served.Close() // ServeTLS does not if it lacks a certificate
			results <- err
		}()
	}
	var failed error
	select {
	case <-ctx.Done():
	case <-o.abort.Done():
	case failed = <-results:
		if errors.Is(failed, http.ErrServerClosed) {
			<-s.conns.noLoops // the others return too
			wait = false      // whoever has called Shutdown waits
			return failed
		}
		s.logger.ErrorContext(ctx, "graceful: serving ended", "error", failed)
	}
	cut := s.stop(ctx)
	for range len(s.doors) {
		select {
		case err := <-results:
			if failed == nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				failed = err
			}
		default:
		}
	}
	switch {
	case cut == nil:
		return failed
	case failed == nil:
		return cut
	}
	return errors.Join(failed, cut)
}

// replace puts the functions of s into the server.
func (s *server) replace() {
	u, srv := &s.user, s.srv
	u.handler, srv.Handler = srv.Handler, s
	u.noOptions, srv.DisableGeneralOptionsHandler = srv.DisableGeneralOptionsHandler, true
	u.connState, srv.ConnState = srv.ConnState, s.connState
	u.connContext, srv.ConnContext = srv.ConnContext, s.connContext
	if u.baseContext = srv.BaseContext; u.baseContext != nil {
		srv.BaseContext = s.baseContext
	}
	// net/http sets these two by itself.
	u.tlsConfig, srv.TLSConfig = srv.TLSConfig, srv.TLSConfig.Clone()
	u.nextProto, srv.TLSNextProto = srv.TLSNextProto, maps.Clone(srv.TLSNextProto)
}

// restore puts back what the user had there. One goroutine may still read Handler,
// and has it either way: that of a stream whose HTTP/2 client has gone, if it has
// been started and has not run at all.
func (s *server) restore() {
	u, srv := &s.user, s.srv
	srv.Handler = u.handler
	srv.DisableGeneralOptionsHandler = u.noOptions
	srv.ConnState = u.connState
	srv.ConnContext = u.connContext
	srv.BaseContext = u.baseContext
	srv.TLSConfig = u.tlsConfig
	srv.TLSNextProto = u.nextProto
}

func (s *server) connState(nc net.Conn, state http.ConnState) {
	if s.user.connState != nil {
		s.user.connState(nc, state)
	}
	s.conns.note(nc, state)
}

// connContext leads from a request to its connection: the key is s itself.
func (s *server) connContext(ctx context.Context, nc net.Conn) context.Context {
	if s.user.connContext != nil {
		if ctx = s.user.connContext(ctx, nc); ctx == nil {
			return nil // net/http has the words for that
		}
	}
	return context.WithValue(ctx, s, s.conns.add(nc))
}

func (s *server) baseContext(ln net.Listener) context.Context {
	for _, d := range s.doors {
		if ln == d.served {
			ln = d.given
		}
	}
	return s.user.baseContext(ln)
}

// stop goes through the phases. Every phase is gone through in every case: with a
// context that has ended, it counts what it would have waited for, and ends.
func (s *server) stop(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	all, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	all, cancel := context.WithTimeout(all, s.total)
	defer cancel()
	defer context.AfterFunc(s.abort, func() { abort(context.Cause(s.abort)) })()
	if len(s.signals) > 0 {
		c := make(chan os.Signal, 1)
		signal.Notify(c, s.signals...)
		defer signal.Stop(c)
		go func() {
			select {
			case sig := <-c:
				abort(fmt.Errorf("%w by signal: %v", context.Canceled, sig))
			case <-all.Done():
			}
		}()
	}

	p := &phases{server: s, ctx: all}
	p.log(slog.LevelInfo, "stopping")
	if s.onStop != nil {
		s.onStop()
	}
	if s.delay > 0 {
		p.run("delayed", s.delay, func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		})
	}
	s.stopping.Store(true)
	begin := time.Now()
	rested := func() time.Duration { return s.conns.rested(begin, s.linger) }
	var cut Error

	if s.shared {
		s.closeAll()
	}
	p.run("turned away", max(2*s.linger, s.linger), func(ctx context.Context) error {
		s.await(ctx, rested)
		return nil
	})
	if !s.shared {
		p.run("drained", s.drain, func(ctx context.Context) (err error) {
			cut.Queued, err = s.drainAll(ctx)
			// At once: the drain follows its SO_REUSEPORT group no longer, and where
			// nothing keeps new clients out they come in between.
			s.closeAll()
			return err
		})
	}
	p.run("first requests", s.first, func(ctx context.Context) error {
		s.await(ctx, func() time.Duration {
			// The listeners may have accepted connections that are not known yet.
			if s.conns.inState[fresh] > 0 || s.conns.loops > 0 {
				return forever
			}
			return rested()
		})
		if ctx.Err() == nil {
			return nil
		}
		if cut.BeforeFirstAnswer = s.conns.closeFresh(); cut.BeforeFirstAnswer > 0 {
			return context.Cause(ctx)
		}
		return nil
	})
	requests := s.requests
	if requests < 0 {
		requests = s.total // which ends first
	}
	p.run("shut down", requests, func(ctx context.Context) error {
		// Shutdown and Close wait for Accept, which may hang: a listener may talk to
		// the client in there, and a function of the user is called in between.
		down := inBackground(func() { s.srv.Shutdown(ctx) })
		select {
		case <-down:
		case <-ctx.Done():
		}
		s.await(ctx, func() time.Duration {
			if s.conns.hijacked > 0 {
				return forever
			}
			return 0
		})
		if ctx.Err() == nil {
			return nil
		}
		cut.Active = s.conns.count().active
		s.conns.closeAll()
		select {
		case <-inBackground(func() { s.srv.Close() }):
		case <-time.After(time.Second / 10):
		}
		if cut.Active > 0 {
			return context.Cause(ctx)
		}
		return nil
	})
	if cut.err = errors.Join(p.errs...); cut.err == nil {
		return nil
	}
	return &cut
}

// phases runs one phase after the other and collects what went wrong.
type phases struct {
	*server
	ctx  context.Context
	errs []error
}

// run runs a phase that may take no longer than limit.
func (p *phases) run(name string, limit time.Duration, f func(context.Context) error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(p.ctx, limit)
	defer cancel()
	err := f(ctx)
	level := slog.LevelInfo
	took := slog.Duration("took", time.Since(began))
	if err == nil {
		p.log(level, name, took)
		return
	}
	p.errs = append(p.errs, fmt.Errorf("%s: %w", name, err))
	p.log(slog.LevelWarn, name, took, slog.Any("error", err))
}

func (p *phases) log(level slog.Level, name string, attrs ...slog.Attr) {
	if queued, ok := p.queued(); ok {
		attrs = append(attrs, slog.Int("queued", queued))
	}
	n := p.conns.count()
	attrs = append(attrs,
		slog.Int("before_first_answer", n.fresh),
		slog.Int("active", n.active),
		slog.Int("idle", n.idle))
	p.logger.LogAttrs(p.ctx, level, "graceful: "+name, attrs...)
}

func inBackground(f func()) (done <-chan struct{}) {
	c := make(chan struct{})
	go func() {
		defer close(c)
		f()
	}()
	return c
}

const forever = time.Duration(math.MaxInt64)

// await returns when ctx ends or nothing is left to wait for. remaining is called
// with the connections locked, at each change of theirs and when the time that it
// returned is over.
func (s *server) await(ctx context.Context, remaining func() time.Duration) {
	for ctx.Err() == nil {
		s.conns.mu.Lock()
		left := remaining()
		s.conns.mu.Unlock()
		if left <= 0 {
			return
		}
		timer := time.NewTimer(left)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-s.conns.changed:
		}
		timer.Stop()
	}
}
