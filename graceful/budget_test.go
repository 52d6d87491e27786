package graceful

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

// Functions of others that hang do not hold up the stop: it ends with its time, or when it
// is aborted. patience is far longer than that.
func TestFunctionsThatHang(t *testing.T) {
	t.Parallel()
	forever := make(chan bool)
	t.Cleanup(func() { close(forever) })
	const total = 100 * time.Millisecond
	hang := func() { <-forever }
	for name, test := range map[string]struct {
		srv  *http.Server
		wrap func(net.Listener) net.Listener
		opts []Option
		fine bool // nothing is cut off
	}{
		"WithOnStop": {opts: []Option{WithOnStop(hang)}},
		"Close of a listener": {wrap: func(ln net.Listener) net.Listener {
			return hanging{Listener: ln, close: hang}
		}},
		"Accept":   {wrap: func(ln net.Listener) net.Listener { return hanging{Listener: ln, accept: hang} }},
		"a logger": {fine: true, opts: []Option{WithLogger(slog.New(hangingLogger{hang}))}},
		"ConnContext": {srv: &http.Server{ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			hang()
			return ctx
		}}},
		"ConnState": {srv: &http.Server{Handler: hello, ConnState: func(net.Conn, http.ConnState) { hang() }}},
		"Close of a connection": {wrap: func(ln net.Listener) net.Listener {
			return slowCloser{ln, hang}
		}, srv: &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hang() })}},
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			var served net.Listener = ln
			if test.wrap != nil {
				served = test.wrap(ln)
			}
			opts := append([]Option{WithTimeout(total), WithLinger(0)}, test.opts...)
			if test.srv == nil {
				test.srv = &http.Server{Handler: hello}
			}
			r := start(t, test.srv, served, opts...)
			c := dial(t, r.addr)
			c.send(get)
			until(t, "the client", func() bool { s, err := ln.Stats(); return err != nil || s.Queued <= 0 })
			if test.fine || test.wrap == nil && len(opts) > 2 {
				c.answer()
			}
			r.stop()
			err := r.wait()
			if test.fine {
				require.NoError(t, err)
				return
			}
			var cut *Error
			require.ErrorAs(t, err, &cut)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

// A hanging listener accepts one connection from which it reads, or its Close hangs.
type hanging struct {
	net.Listener
	accept, close func()
}

func (l hanging) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if l.accept != nil {
		l.accept()
	}
	return nc, err
}

func (l hanging) Close() error {
	err := l.Listener.Close()
	if l.close != nil {
		l.close()
	}
	return err
}

type slowCloser struct {
	net.Listener
	close func()
}

type slowConn struct {
	net.Conn
	close func()
}

func (l slowCloser) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &slowConn{nc, l.close}, nil
}

func (c *slowConn) Close() error {
	defer c.close()
	return c.Conn.Close()
}

type hangingLogger struct{ hang func() }

func (hangingLogger) Enabled(context.Context, slog.Level) bool { return true }
func (l hangingLogger) WithAttrs([]slog.Attr) slog.Handler     { return l }
func (l hangingLogger) WithGroup(string) slog.Handler          { return l }
func (l hangingLogger) Handle(context.Context, slog.Record) error {
	l.hang()
	return nil
}

// A listener may end with the error of a server that is shut down, though it is not.
func TestListenerThatClaimsAShutdown(t *testing.T) {
	ln := broken{listen(t), make(chan error)}
	other := listen(t)
	r := start(t, &http.Server{Handler: hello}, ln, WithListener(other), WithLinger(0))
	ln.fail <- http.ErrServerClosed
	require.ErrorIs(t, r.wait(), http.ErrServerClosed)
	require.ErrorIs(t, other.Close(), net.ErrClosed)
}

// A handler is waited for even if its HTTP/2 client has gone, as with HTTP/1.
func TestHandlerWhoseClientHasGone(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			inside, going := make(chan bool), make(chan bool)
			srv, serve := serverOf(protocol, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				inside <- true
				<-r.Context().Done()
				inside <- true
				<-going
			}))
			ln := listen(t)
			log := new(journal)
			r := begin(t, ln, func(ctx context.Context) error { return serve(ctx, srv, ln, WithLinger(0), log.option()) })
			r.srv = srv
			tr, scheme := transportOf(protocol)
			ctx, leave := context.WithCancel(t.Context())
			var asked sync.WaitGroup
			asked.Go(func() {
				req, _ := http.NewRequestWithContext(ctx, "GET", scheme+"://"+r.addr, nil)
				tr.RoundTrip(req)
			})
			<-inside
			leave()
			asked.Wait()
			tr.CloseIdleConnections()
			<-inside
			r.stop()
			log.after(t, "first requests")
			require.Never(t, func() bool { return len(r.result) > 0 }, 20*time.Millisecond, time.Millisecond)
			close(going)
			require.NoError(t, r.wait())
		})
	}
}

// Other code may close the server during the stop. Serve reports what that cut off.
func TestCloseDuringTheStop(t *testing.T) {
	inside, going := make(chan bool), make(chan bool)
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		inside <- true
		<-going
	})}
	r := start(t, srv, listen(t), WithLinger(patience), WithTimeout(time.Hour))
	for range 5 {
		dial(t, r.addr).send(get)
		<-inside
	}
	r.stop()
	r.turningAway()
	require.NoError(t, srv.Close())
	close(going)
	err := r.wait()
	var cut *Error
	require.ErrorAs(t, err, &cut)
	require.Equal(t, Error{Active: 5, err: cut.err}, *cut)
	require.ErrorIs(t, err, http.ErrServerClosed)
}

func TestShutdownDuringTheStop(t *testing.T) {
	log := new(journal)
	srv := &http.Server{Handler: hello}
	r := start(t, srv, listen(t), WithDelay(50*time.Millisecond), log.option())
	r.stop()
	log.after(t, "stopping")
	require.NoError(t, srv.Shutdown(context.Background()))
	require.Equal(t, http.ErrServerClosed, r.wait())
}

// never is a listener that does not accept until it is closed.
type never struct {
	net.Listener
	closed chan struct{}
	once   *sync.Once
}

func neverAccept(ln net.Listener) *never { return &never{ln, make(chan struct{}), new(sync.Once)} }

func (l *never) Accept() (net.Conn, error) { <-l.closed; return nil, net.ErrClosed }
func (l *never) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// Several listeners around one socket have one queue.
func TestQueueCountsOnce(t *testing.T) {
	t.Parallel()
	ln := listen(t)
	requireDrain(t, ln)
	one, other := neverAccept(ln), neverAccept(ln)
	r := start(t, new(http.Server), one, WithListener(other, one), WithSocket(ln), WithTimeout(250*time.Millisecond), WithLinger(0))
	for range 3 {
		dial(t, r.addr)
	}
	r.stop()
	err := r.wait()
	var cut *Error
	require.ErrorAs(t, err, &cut)
	require.Equal(t, Error{Queued: 3, err: cut.err}, *cut)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NotErrorIs(t, err, context.Canceled)
	require.NotContains(t, err.Error(), "\n")
}

func requireDrain(t *testing.T, ln *acceptq.Listener) {
	t.Helper()
	if err := ln.Drain(t.Context()); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, ln.Resume())
}

// The queue of a socket with another holder is not lost.
func TestQueueOfASharedSocket(t *testing.T) {
	t.Parallel()
	ln := listen(t)
	requireDrain(t, ln)
	f, err := ln.File()
	require.NoError(t, err)
	defer f.Close()
	heir, err := net.FileListener(f)
	require.NoError(t, err)
	defer heir.Close()
	if inodeOf(ln) == 0 {
		t.Skip("the system does not tell whether a socket has another holder")
	}
	r := start(t, new(http.Server), neverAccept(ln), WithTimeout(250*time.Millisecond), WithLinger(0))
	for range 3 {
		dial(t, r.addr)
	}
	r.stop()
	require.NoError(t, r.wait())
	go http.Serve(heir, hello)
	c := dial(t, r.addr)
	c.send(get)
	c.answer()
}

// An ordinary stop returns nil, with a client that has connected and sent nothing too, as
// browsers do.
func TestSilentClientIsNoError(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"HTTP/1", "HTTPS", "HTTP/2"} {
		t.Run(protocol, func(t *testing.T) {
			srv, serve := serverOf(protocol, hello)
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error {
				return serve(ctx, srv, ln, part(50*time.Millisecond), WithLinger(0))
			})
			r.srv = srv
			c := dial(t, r.addr)
			if _, known := trafficOf(c.Conn); !known {
				t.Skip("the system does not tell whether a client is silent")
			}
			if protocol != "HTTP/1" {
				c = secure(t, c, protocol)
			}
			until(t, "the client", func() bool { return r.counts().open() == 1 })
			time.Sleep(50 * time.Millisecond) // its last bytes arrive
			r.stop()
			require.NoError(t, r.wait())
			_, err := io.Copy(io.Discard, c.r) // HTTP/2 sends its settings
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
		})
	}
}

// What the stop closes in the background does not keep its time: the clients do not read,
// and closing a connection with SO_LINGER waits for them.
func TestCloseThatLingers(t *testing.T) {
	t.Parallel()
	inside := make(chan bool)
	r := start(t, &http.Server{
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
			nc.(*net.TCPConn).SetLinger(3) // seconds
			return ctx
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			inside <- true
			b := make([]byte, 1<<20)
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		}),
	}, listen(t), WithTimeout(100*time.Millisecond))
	var clients []*client
	for range 12 {
		clients = append(clients, dial(t, r.addr))
		clients[len(clients)-1].send(get)
		<-inside
	}
	r.stop()
	var cut *Error
	require.ErrorAs(t, r.wait(), &cut) // within the patience, which is shorter than 12 × 3 s
	require.Equal(t, 12, cut.Active)
	for _, c := range clients {
		c.Close()
	}
	until(t, "the last connection", func() bool { return r.counts().open() == 0 })
}

// The header of an answer is decided when its first bytes are there, not when the handler
// begins to copy from a slow source.
func TestSlowSource(t *testing.T) {
	inside := make(chan bool)
	source, write := io.Pipe()
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(inside)
		io.Copy(w, source)
	})}, listen(t), WithLinger(time.Minute), WithTimeout(time.Hour))
	c := dial(t, r.addr)
	c.send(get)
	<-inside
	r.stop()
	r.turningAway()
	io.WriteString(write, "hello")
	io.WriteString(write, strings.Repeat("x", 1000))
	write.Close()
	resp, body := c.answer()
	require.True(t, resp.Close)
	require.Len(t, body, 1005)
	require.NoError(t, r.wait())
}

// A linger and a delay that leave no time for the rest are an error.
func TestTimeIsLeft(t *testing.T) {
	for _, opts := range [][]Option{
		{WithDelay(time.Second), WithTimeout(time.Second)},
		{WithLinger(2500 * time.Millisecond), WithTimeout(2500 * time.Millisecond)},
		{WithDelay(time.Second), WithLinger(time.Second), WithTimeout(2 * time.Second)},
	} {
		_, err := newOptions(opts, false)
		require.ErrorContains(t, err, "raise WithTimeout")
	}
	for _, opts := range [][]Option{
		{},
		{WithTimeout(time.Millisecond)},
		{WithDelay(10 * time.Second), WithLinger(5 * time.Second)},
		{WithDelay(20 * time.Second)},
	} {
		o, err := newOptions(opts, false)
		require.NoError(t, err)
		require.LessOrEqual(t, o.delay+o.linger+o.part, o.total)
	}
}
