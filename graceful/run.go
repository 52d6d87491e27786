package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"time"
)

// Run serves ln with serve until ctx ends, and then stops the server without losing a
// connection. serve is the Serve method of a server of any kind, or an accept loop. Run
// calls it once for each listener, concurrently, and closes ln. For an [http.Server] use
// [Serve], for a gRPC server [ServeGRPC].
//
// When ctx ends, Run drains the listener and waits until each accepted connection was
// answered for the first time or is closed: until the server has written to it, and has
// read nothing since. Then the Accept method of the listener returns [net.ErrClosed], and
// Run calls shutdown, which tells the server to end its connections and may wait for that.
// shutdown may be nil. Run waits until all connections are closed and serve has returned.
// What is left when the time is over is closed and counted in an [*Error]. The package
// comment describes the phases and their time.
//
// Connections stay open until the server, shutdown or the client closes them. If they end
// by themselves when shutdown would interrupt a client, [WithLinger] gives them time: it
// sets how long a connection must have been at rest before Run calls shutdown. Run drains
// when all of them have been at rest for that time, or when twice that time is over. With
// Run the default is 0.
//
// serve gets connections with the methods of those that ln accepts, if these are of type
// [*net.TCPConn], [*net.UnixConn] or [*tls.Conn]. io.Copy uses sendfile(2) as before. Other
// types have the methods of [net.Conn] only. If the server uses TLS, pass a listener of
// [tls.NewListener]: a handshake inside serve counts as an answer.
//
// The error is that of serve if it ended first. Run then stops the server in the same
// phases.
func Run(ctx context.Context, ln Listener, serve func(net.Listener) error, shutdown func(context.Context) error, opts ...Option) error {
	return run(ctx, ln, serve, func(ctx context.Context) {
		if shutdown != nil {
			shutdown(ctx)
		}
	}, func() {}, opts)
}

// A GRPCServer is a server with the methods of a grpc.Server.
type GRPCServer interface {
	Serve(net.Listener) error
	GracefulStop()
	Stop()
}

// ServeGRPC serves srv on ln until ctx ends, and then stops it without losing a call. It is
// like [Run] with GracefulStop, which closes a connection that srv has accepted and not yet
// begun to serve, if it is called alone. When the time is over, ServeGRPC calls Stop.
//
// The connections of srv may use the TLS of package credentials.
func ServeGRPC(ctx context.Context, srv GRPCServer, ln Listener, opts ...Option) error {
	var serve func(net.Listener) error
	if srv != nil {
		serve = srv.Serve
	}
	return run(ctx, ln, serve, func(context.Context) { srv.GracefulStop() }, func() { srv.Stop() }, opts)
}

func run(ctx context.Context, ln Listener, serve func(net.Listener) error, shutdown func(context.Context), cut func(), opts []Option) error {
	s := &server{serve: serve, shutdown: shutdown, cut: cut, closed: func() bool { return false }}
	s.conns.raw = true
	return s.start(ctx, ln, opts, func() error {
		if serve == nil {
			return errors.New("graceful: nil server")
		}
		return nil
	})
}

// watch returns a connection with the methods of nc that tells c its state.
func (c *conn) watch(nc net.Conn) net.Conn {
	switch nc := nc.(type) {
	case *net.TCPConn:
		return &tcpConn{nc, c}
	case *net.UnixConn:
		return &unixConn{nc, c}
	case *tls.Conn:
		return &tlsConn{nc, c}
	}
	return &otherConn{nc, c}
}

// A watched connection is active after a Read, and idle after a Write.
func (c *conn) read(n int, err error) (int, error) {
	if n > 0 {
		c.word.CompareAndSwap(idle, active)
	}
	return n, err
}

func (c *conn) wrote(n int, err error) (int, error) {
	if n > 0 {
		c.writes.Add(1)
		c.set(idle)
	}
	return n, err
}

func (c *conn) closed(err error) error {
	c.set(gone)
	return err
}

// lookOfRun returns the state of c. A server such as cmux writes for the first time before another
// one serves the connection, so one Write is no answer, unless the stop has seen c at rest.
func (c *conn) lookOfRun(state int64, linger time.Duration) int64 {
	if state == idle || state == fresh && c.hasSent() {
		c.answered = true
	}
	switch {
	case c.closing.Load():
		return gone
	case c.conns.stopping.Load() && hasClosed(c.Conn): // not with the method of the watched connection
		c.set(gone)
		return gone
	case !c.answered && c.writes.Load() < 2:
		return fresh
	case state == fresh, state == idle && c.pause != nil && time.Since(c.pause.since) >= linger:
		return rested
	}
	return state
}

// hasSent reports whether the server has sent something without the methods of the
// connection, as net.Buffers does.
func (c *conn) hasSent() bool {
	if _, ok := c.Conn.(syscall.Conn); !ok {
		return false // TLS sends in its handshake
	}
	t, known := trafficOf(c.Conn)
	return known && t.sent > 0
}

type tcpConn struct {
	*net.TCPConn
	c *conn
}

func (w *tcpConn) Read(p []byte) (int, error)  { return w.c.read(w.TCPConn.Read(p)) }
func (w *tcpConn) Write(p []byte) (int, error) { return w.c.wrote(w.TCPConn.Write(p)) }
func (w *tcpConn) Close() error                { return w.c.closed(w.TCPConn.Close()) }

func (w *tcpConn) ReadFrom(r io.Reader) (int64, error) {
	n, err := w.TCPConn.ReadFrom(r)
	w.c.wrote(int(min(n, 1)), nil)
	return n, err
}

type unixConn struct {
	*net.UnixConn
	c *conn
}

func (w *unixConn) Read(p []byte) (int, error)  { return w.c.read(w.UnixConn.Read(p)) }
func (w *unixConn) Write(p []byte) (int, error) { return w.c.wrote(w.UnixConn.Write(p)) }
func (w *unixConn) Close() error                { return w.c.closed(w.UnixConn.Close()) }

type tlsConn struct {
	*tls.Conn
	c *conn
}

func (w *tlsConn) Read(p []byte) (int, error)  { return w.c.read(w.Conn.Read(p)) }
func (w *tlsConn) Write(p []byte) (int, error) { return w.c.wrote(w.Conn.Write(p)) }
func (w *tlsConn) Close() error                { return w.c.closed(w.Conn.Close()) }

type otherConn struct {
	net.Conn
	c *conn
}

func (w *otherConn) Read(p []byte) (int, error)  { return w.c.read(w.Conn.Read(p)) }
func (w *otherConn) Write(p []byte) (int, error) { return w.c.wrote(w.Conn.Write(p)) }
func (w *otherConn) Close() error                { return w.c.closed(w.Conn.Close()) }
