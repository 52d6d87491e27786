package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"net"
	"net/http"
	"sync"
)

// Serve serves srv on ln until ctx ends, and then stops it without losing a request. The
// package comment describes the phases of the stop. Serve returns nil if nothing was cut
// off. It always closes ln.
//
// The error is or wraps one of these:
//   - [*Error]: requests or connections were cut off, because the time was over or the
//     stop was aborted.
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
// Serve replaces fields of srv and does not restore them: srv cannot serve again
// afterwards, see [http.Server.Shutdown]. It is an error if srv is already being served by
// Serve.
func Serve(ctx context.Context, srv *http.Server, ln Listener, opts ...Option) error {
	return serveHTTP(ctx, srv, ln, func(ln net.Listener) error { return srv.Serve(ln) }, opts)
}

// ServeTLS is like [Serve], but it calls [http.Server.ServeTLS] to serve HTTPS. The file
// names can be "" if srv.TLSConfig has the certificate.
func ServeTLS(ctx context.Context, srv *http.Server, ln Listener, certFile, keyFile string, opts ...Option) error {
	return serveHTTP(ctx, srv, ln, func(ln net.Listener) error { return srv.ServeTLS(ln, certFile, keyFile) }, opts)
}

// An httpServer holds an http.Server and the functions that Serve replaced.
type httpServer struct {
	server
	srv  *http.Server
	user struct {
		handler     http.Handler
		noOptions   bool
		connState   func(net.Conn, http.ConnState)
		connContext func(context.Context, net.Conn) context.Context
		baseContext func(net.Listener) context.Context
	}
}

var errTwice = errors.New("graceful: the server is already being served")

func serveHTTP(ctx context.Context, srv *http.Server, ln Listener, serve func(net.Listener) error, opts []Option) error {
	h := &httpServer{srv: srv}
	h.serve = serve
	h.shutdown = func(ctx context.Context) { srv.Shutdown(ctx) }
	h.cut = func() { srv.Close() }
	h.closed = h.isShutDown
	return h.start(ctx, ln, opts, h.replace)
}

// replacing guards the fields of all servers against two calls of Serve.
var replacing sync.Mutex

// replace replaces fields of the server with the functions of h.
func (h *httpServer) replace() error {
	u, srv := &h.user, h.srv
	if srv == nil {
		return errors.New("graceful: nil server")
	}
	replacing.Lock()
	defer replacing.Unlock()
	if former, ok := srv.Handler.(*httpServer); ok {
		if former.isShutDown() {
			return http.ErrServerClosed
		}
		return errTwice
	}
	u.handler, srv.Handler = srv.Handler, h
	u.noOptions, srv.DisableGeneralOptionsHandler = srv.DisableGeneralOptionsHandler, true
	u.connState, srv.ConnState = srv.ConnState, h.connState
	u.connContext, srv.ConnContext = srv.ConnContext, h.connContext
	if u.baseContext = srv.BaseContext; u.baseContext != nil {
		srv.BaseContext = h.baseContext
	}
	srv.TLSNextProto = maps.Clone(srv.TLSNextProto)
	for name, f := range srv.TLSNextProto {
		if name != "h2" && name != "unencrypted_http2" { // golang.org/x/net/http2 reports states
			srv.TLSNextProto[name] = func(srv *http.Server, c *tls.Conn, handler http.Handler) {
				if c := h.ofProtocol(handler); c != nil {
					c.begin()
					defer c.end(context.Background())
				}
				f(srv, c, handler)
			}
		}
	}
	return nil
}

// ofProtocol returns the connection of a function in TLSNextProto, to which net/http passes
// a handler that has the context. net/http reports no states of the connection.
func (h *httpServer) ofProtocol(handler http.Handler) (c *conn) {
	if b, ok := handler.(interface{ BaseContext() context.Context }); ok {
		c, _ = b.BaseContext().Value(h).(*conn)
	}
	return c
}

func (h *httpServer) connState(nc net.Conn, state http.ConnState) {
	if h.user.connState != nil {
		h.user.connState(unkeyed(nc), state)
	}
	h.conns.note(nc, state)
}

// connContext adds the connection to the context of its requests. The key is h.
func (h *httpServer) connContext(ctx context.Context, nc net.Conn) context.Context {
	if h.user.connContext != nil {
		if ctx = h.user.connContext(ctx, unkeyed(nc)); ctx == nil {
			return nil // net/http panics with its own message
		}
	}
	return context.WithValue(ctx, h, h.conns.add(nc))
}

func (h *httpServer) baseContext(ln net.Listener) context.Context {
	switch d := ln.(type) {
	case *door:
		ln = d.given
	case probe:
		return context.Background()
	}
	return h.user.baseContext(ln)
}

// isShutDown reports whether the server was closed or shut down. It refuses to serve then.
func (h *httpServer) isShutDown() bool { return errors.Is(h.srv.Serve(probe{}), http.ErrServerClosed) }

// A probe is a listener that has no connections.
type probe struct{ net.Listener }

func (probe) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (probe) Close() error              { return nil }

// accepted returns what the server gets of an accepted connection, which can be a key of
// conns.
func (cs *conns) accepted(nc net.Conn) net.Conn {
	if !hashable(nc) {
		nc = &keyedConn{nc}
	}
	if cs.raw {
		nc = cs.add(nc).watch(nc)
	}
	return nc
}

type keyedConn struct{ net.Conn }

// unkeyed returns what the listener of the caller has accepted.
func unkeyed(nc net.Conn) net.Conn {
	if k, ok := nc.(*keyedConn); ok {
		return k.Conn
	}
	return nc
}
