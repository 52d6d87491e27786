package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
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
// sets how long a connection must have been at rest before Run calls shutdown. With Run the
// default is 0.
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
	s.accept = s.conns.watch
	return s.start(ctx, ln, opts, func() error {
		if serve == nil {
			return errors.New("graceful: nil server")
		}
		return nil
	})
}

// watch returns a connection with the methods of nc that tells cs its state.
func (cs *conns) watch(nc net.Conn) net.Conn {
	w := watched{cs, cs.add(nc)}
	switch nc := nc.(type) {
	case *net.TCPConn:
		return &tcpConn{nc, w}
	case *net.UnixConn:
		return &unixConn{nc, w}
	case *tls.Conn:
		return &tlsConn{nc, w}
	}
	return &otherConn{nc, w}
}

// A watched connection is in the state busy after a Read, and idle after a Write.
type watched struct {
	cs *conns
	c  *conn
}

func (w watched) read(n int, err error) (int, error) {
	if n > 0 && w.c.state.Load() == idle {
		w.c.set(busy)
	}
	return n, err
}

func (w watched) wrote() {
	if state := w.c.state.Load(); state != gone {
		if state != idle {
			w.c.answers.Add(1)
		}
		w.cs.rest(w.c)
	}
}

func (w watched) write(n int, err error) (int, error) {
	if n > 0 {
		w.wrote()
	}
	return n, err
}

func (w watched) close(err error) error {
	w.cs.forget(w.c)
	return err
}

type tcpConn struct {
	*net.TCPConn
	w watched
}

func (c *tcpConn) Read(p []byte) (int, error)  { return c.w.read(c.TCPConn.Read(p)) }
func (c *tcpConn) Write(p []byte) (int, error) { return c.w.write(c.TCPConn.Write(p)) }
func (c *tcpConn) Close() error                { return c.w.close(c.TCPConn.Close()) }

func (c *tcpConn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.TCPConn.ReadFrom(r)
	if n > 0 {
		c.w.wrote()
	}
	return n, err
}

type unixConn struct {
	*net.UnixConn
	w watched
}

func (c *unixConn) Read(p []byte) (int, error)  { return c.w.read(c.UnixConn.Read(p)) }
func (c *unixConn) Write(p []byte) (int, error) { return c.w.write(c.UnixConn.Write(p)) }
func (c *unixConn) Close() error                { return c.w.close(c.UnixConn.Close()) }

type tlsConn struct {
	*tls.Conn
	w watched
}

func (c *tlsConn) Read(p []byte) (int, error)  { return c.w.read(c.Conn.Read(p)) }
func (c *tlsConn) Write(p []byte) (int, error) { return c.w.write(c.Conn.Write(p)) }
func (c *tlsConn) Close() error                { return c.w.close(c.Conn.Close()) }

type otherConn struct {
	net.Conn
	w watched
}

func (c *otherConn) Read(p []byte) (int, error)  { return c.w.read(c.Conn.Read(p)) }
func (c *otherConn) Write(p []byte) (int, error) { return c.w.write(c.Conn.Write(p)) }
func (c *otherConn) Close() error                { return c.w.close(c.Conn.Close()) }
