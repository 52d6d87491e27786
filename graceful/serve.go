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

// A Listener is what [Serve] accepts connections from: a [net.Listener] or an
// [*acceptq.Shards].
type Listener interface {
	Addr() net.Addr
	Close() error
}

// Serve serves srv on ln until ctx ends, and then stops it without losing a request. The
// package comment describes the phases of the stop. Serve returns nil if nothing was cut
// off. It always closes ln.
//
// The error is or wraps one of these:
//   - [*Error]: a time limit ended a phase, or the stop was aborted, and requests or
//     connections were cut off.
//   - The error of Accept: Accept failed. Serve then stops the server in the same
//     phases, so that the requests in progress are answered.
//   - [http.ErrServerClosed]: other code closed srv or shut it down. Serve then returns
//     at once, as [http.Server.Serve] does.
//
// ln can be a [net.Listener] of any type, but one of package acceptq is best. Serve calls
// [acceptq.Wrap] for a [*net.TCPListener]: it counts as shared, so some clients wait for a
// second, and on an MPTCP socket new clients are not kept out. For other wrapped listeners
// see [WithSocket]. A listener that cannot be drained is closed in that phase, and the
// kernel resets the connections in its queue.
//
// It is an error if srv is already being served by Serve.
func Serve(ctx context.Context, srv *http.Server, ln Listener, opts ...Option) error {
	return serve(ctx, srv, ln, srv.Serve, opts)
}

// ServeTLS is like [Serve], but it calls [http.Server.ServeTLS] to serve HTTPS. The file
// names can be "" if srv.TLSConfig has the certificate.
func ServeTLS(ctx context.Context, srv *http.Server, ln Listener, certFile, keyFile string, opts ...Option) error {
	return serve(ctx, srv, ln, func(ln net.Listener) error { return srv.ServeTLS(ln, certFile, keyFile) }, opts)
}

// A server holds an http.Server that is being served and the fields that Serve replaced.
type server struct {
	*options
	srv      *http.Server
	conns    conns
	stopping atomic.Bool // each answer closes its connection
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

var errTwice = errors.New("graceful: the server is already being served")

func serve(ctx context.Context, srv *http.Server, ln Listener, serve func(net.Listener) error, opts []Option) error {
	o, err := newOptions(opts)
	listeners := append([]Listener{ln}, o.listeners...)
	switch {
	case err != nil:
	case ctx == nil:
		err = errors.New("graceful: nil context")
	case srv == nil:
		err = errors.New("graceful: nil server")
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
			// Every connection is closed by now, so this is short, unless a function of
			// the caller hangs. In that case the last connection restores the fields.
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
			<-s.conns.noLoops // the other loops return too
			wait = false      // the caller of Shutdown waits for the connections
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

// replace replaces fields of the server with the functions of s.
func (s *server) replace() {
	u, srv := &s.user, s.srv
	u.handler, srv.Handler = srv.Handler, s
	u.noOptions, srv.DisableGeneralOptionsHandler = srv.DisableGeneralOptionsHandler, true
	u.connState, srv.ConnState = srv.ConnState, s.connState
	u.connContext, srv.ConnContext = srv.ConnContext, s.connContext
	if u.baseContext = srv.BaseContext; u.baseContext != nil {
		srv.BaseContext = s.baseContext
	}
	// net/http changes these two fields.
	u.tlsConfig, srv.TLSConfig = srv.TLSConfig, srv.TLSConfig.Clone()
	u.nextProto, srv.TLSNextProto = srv.TLSNextProto, maps.Clone(srv.TLSNextProto)
}

// restore restores the fields of the server. One goroutine may still read Handler: that of
// an HTTP/2 stream whose client has gone, if the goroutine has not begun to run. Both
// values of Handler are correct for it.
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

// connContext adds the connection to the context of its requests. The key is s.
func (s *server) connContext(ctx context.Context, nc net.Conn) context.Context {
	if s.user.connContext != nil {
		if ctx = s.user.connContext(ctx, nc); ctx == nil {
			return nil // net/http panics with its own message
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

// stop runs the phases. It runs every phase, even if the context has ended: the phase then
// only counts what it would have waited for.
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
			// Close at once: after the drain nothing follows the SO_REUSEPORT group, and
			// where new clients are not kept out, they connect in between.
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
		requests = s.total // the limit of all phases ends first
	}
	p.run("shut down", requests, func(ctx context.Context) error {
		// Shutdown and Close wait for Accept, which may hang: the Accept method of a
		// listener may read from the client, or a function of the caller may block.
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

// phases runs one phase after the other and collects their errors.
type phases struct {
	*server
	ctx  context.Context
	errs []error
}

// run runs a phase with a time limit.
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

// await waits until ctx ends or remaining returns 0 or less. It calls remaining again at
// each change of the connections and when the returned time has passed. The connections
// are locked during the call.
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
