package graceful

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// echo is an accept loop that answers each line, and hands each connection to seen.
func echo(seen func(net.Conn)) func(net.Listener) error {
	return func(ln net.Listener) error {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return err
			}
			if seen != nil {
				seen(nc)
			}
			go func() {
				defer nc.Close()
				lines := bufio.NewReader(nc)
				for {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					io.WriteString(nc, line)
				}
			}()
		}
	}
}

func runEcho(t *testing.T, ln Listener, seen func(net.Conn), shutdown func(context.Context) error, opts ...Option) *running {
	return begin(t, ln, func(ctx context.Context) error { return Run(ctx, ln, echo(seen), shutdown, opts...) })
}

func (c *client) ask(line string) {
	c.t.Helper()
	c.send(line)
	answer, err := c.r.ReadString('\n')
	require.NoError(c.t, err)
	require.Equal(c.t, line, answer)
}

// Run waits until each client has been answered, and then until it has gone.
func TestRun(t *testing.T) {
	t.Parallel()
	log := new(journal)
	down := make(chan bool)
	r := runEcho(t, listen(t), nil, func(context.Context) error { close(down); return nil }, log.option())
	old, fresh := dial(t, r.addr), dial(t, r.addr)
	old.ask("first\n")
	r.stop()
	log.after(t, "drained")
	old.ask("second\n")
	require.Empty(t, down)
	fresh.ask("first\n")
	<-down
	old.ask("third\n")
	fresh.ask("second\n")
	old.Close()
	fresh.Close()
	require.NoError(t, r.wait())
}

// A connection must have been at rest for the linger before Run calls shutdown.
func TestRunLingers(t *testing.T) {
	t.Parallel()
	down := newEvent()
	r := runEcho(t, listen(t), nil, func(context.Context) error { down.happen(); return nil },
		WithLinger(time.Minute), WithTimeout(time.Hour))
	c := dial(t, r.addr)
	c.ask("first\n")
	r.stop()
	c.ask("second\n")
	require.Never(t, down.happened, 20*time.Millisecond, time.Millisecond)
	c.Close()
	<-down.Done()
	require.NoError(t, r.wait())
}

// What is left when the time is over is closed and counted. A client that has sent nothing
// is not.
func TestRunCuts(t *testing.T) {
	t.Parallel()
	r := runEcho(t, listen(t), nil, nil, WithTimeout(300*time.Millisecond))
	session, silent, half := dial(t, r.addr), dial(t, r.addr), dial(t, r.addr)
	session.ask("first\n")
	half.send("fir")
	r.stop()
	err := r.wait()
	var cut *Error
	require.ErrorAs(t, err, &cut)
	want := Error{BeforeFirstAnswer: 1, Active: 1, err: cut.err}
	if _, known := trafficOf(silent.Conn); !known {
		want.BeforeFirstAnswer = 2 // and the silent one
	}
	require.Equal(t, want, *cut)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	for _, c := range []*client{session, silent, half} {
		c.closed()
	}
}

// The server gets connections with the methods of those that were accepted.
func TestRunKeepsMethods(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		listen func(t *testing.T) net.Listener
		has    func(nc net.Conn) bool
	}{
		"TCP": {func(t *testing.T) net.Listener { return listen(t) }, func(nc net.Conn) bool {
			_, ok := nc.(interface {
				io.ReaderFrom
				io.WriterTo
				syscall.Conn
				CloseRead() error
				CloseWrite() error
				File() (*os.File, error)
				MultipathTCP() (bool, error)
				SetKeepAlive(bool) error
				SetKeepAliveConfig(net.KeepAliveConfig) error
				SetKeepAlivePeriod(time.Duration) error
				SetLinger(int) error
				SetNoDelay(bool) error
				SetReadBuffer(int) error
				SetWriteBuffer(int) error
			})
			return ok
		}},
		"TLS": {func(t *testing.T) net.Listener { return tls.NewListener(listen(t), tlsConfig()) }, func(nc net.Conn) bool {
			_, ok := nc.(interface {
				ConnectionState() tls.ConnectionState
				HandshakeContext(context.Context) error
				NetConn() net.Conn
			})
			return ok
		}},
		"unix": {func(t *testing.T) net.Listener {
			ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Skip(err)
			}
			return ln
		}, func(nc net.Conn) bool { _, ok := nc.(syscall.Conn); return ok }},
		"other": {func(t *testing.T) net.Listener { return tagger{listen(t)} }, func(net.Conn) bool { return true }},
	} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan net.Conn, 1)
			ln := test.listen(t)
			r := runEcho(t, ln, func(nc net.Conn) { seen <- nc }, nil)
			nc, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
			require.NoError(t, err)
			if name == "TLS" {
				nc = tls.Client(nc, trusting)
			}
			c := newClient(t, nc)
			c.ask("hello\n")
			require.True(t, test.has(<-seen))
			c.Close()
			r.stop()
			require.NoError(t, r.wait())
		})
	}
}

// A server may close the socket of a connection, and not the connection that it got.
func TestRunKnowsOtherCloses(t *testing.T) {
	ln := listen(t)
	closed := make(chan bool)
	r := begin(t, tls.NewListener(ln, tlsConfig()), func(ctx context.Context) error {
		return Run(ctx, tls.NewListener(ln, tlsConfig()), func(ln net.Listener) error {
			for {
				nc, err := ln.Accept()
				if err != nil {
					return err
				}
				nc.(interface{ NetConn() net.Conn }).NetConn().Close()
				close(closed)
			}
		}, nil, WithTimeout(time.Hour), part(time.Minute))
	})
	dial(t, r.addr)
	<-closed
	r.stop()
	require.NoError(t, r.wait())
}

// A server that writes without the method Write has answered too.
func TestRunKnowsOtherWrites(t *testing.T) {
	file := filepath.Join(t.TempDir(), "answer")
	require.NoError(t, os.WriteFile(file, []byte("hello\n"), 0o600))
	for name, write := range map[string]func(net.Conn){
		"io.Copy": func(nc net.Conn) {
			f, err := os.Open(file)
			if err == nil {
				io.Copy(nc, f)
				f.Close()
			}
		},
		"net.Buffers": func(nc net.Conn) { (&net.Buffers{[]byte("hel"), []byte("lo\n")}).WriteTo(nc) },
	} {
		t.Run(name, func(t *testing.T) {
			down := make(chan bool)
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error {
				return Run(ctx, ln, func(ln net.Listener) error {
					for {
						nc, err := ln.Accept()
						if err != nil {
							return err
						}
						go func() {
							write(nc)
							<-down
							nc.Close()
						}()
					}
				}, func(context.Context) error { close(down); return nil }, WithTimeout(time.Hour), part(time.Minute))
			})
			c := dial(t, r.addr)
			line, err := c.r.ReadString('\n')
			require.NoError(t, err)
			require.Equal(t, "hello\n", line)
			if _, known := trafficOf(c.Conn); !known && name == "net.Buffers" {
				t.Skip("the system does not tell what was sent")
			}
			r.stop()
			c.closed()
			require.NoError(t, r.wait())
		})
	}
}

func TestRunWithAServerThatEnds(t *testing.T) {
	failure := errors.New("no more")
	ln := listen(t)
	r := begin(t, ln, func(ctx context.Context) error {
		return Run(ctx, ln, func(net.Listener) error { return failure }, nil)
	})
	require.Equal(t, failure, r.wait())
	require.ErrorIs(t, ln.Close(), net.ErrClosed)
}

// serve may do more than call Accept, and may return late or never.
func TestRunWithAServerThatDoesNotReturn(t *testing.T) {
	forever := make(chan bool)
	defer close(forever)
	ln := listen(t)
	r := begin(t, ln, func(ctx context.Context) error {
		return Run(ctx, ln, func(ln net.Listener) error {
			ln.Accept()
			<-forever
			return nil
		}, nil, WithTimeout(100*time.Millisecond))
	})
	r.stop()
	err := r.wait()
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "the server has not returned")
}

// A rpcServer has the methods of a grpc.Server.
type rpcServer struct {
	http.Server
	closed bool
}

func (s *rpcServer) Stop()         { s.closed = true; s.Close() }
func (s *rpcServer) GracefulStop() { s.Shutdown(context.Background()) }

func TestServeGRPC(t *testing.T) {
	t.Parallel()
	for name, hang := range map[string]bool{"all calls end": false, "a call does not": true} {
		t.Run(name, func(t *testing.T) {
			going := make(chan bool)
			defer close(going)
			srv := &rpcServer{Server: http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/hang" {
					select {
					case <-going:
					case <-r.Context().Done():
					}
				}
				io.WriteString(w, "hello")
			})}}
			ln := listen(t)
			log := new(journal)
			r := begin(t, ln, func(ctx context.Context) error {
				return ServeGRPC(ctx, srv, ln, WithTimeout(time.Second), log.option())
			})
			c := dial(t, r.addr)
			if hang {
				dial(t, r.addr).send("GET /hang HTTP/1.1\r\nHost: test\r\n\r\n")
			}
			r.stop()
			log.after(t, "drained")
			c.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n")
			_, body := c.answer()
			require.Equal(t, "hello", body)
			c.closed()
			err := r.wait()
			require.Equal(t, hang, srv.closed)
			if !hang {
				require.NoError(t, err)
				return
			}
			var cut *Error
			require.ErrorAs(t, err, &cut)
			require.Equal(t, 1, cut.BeforeFirstAnswer)
		})
	}
	require.Error(t, ServeGRPC(t.Context(), nil, listen(t)))
	require.Error(t, Run(t.Context(), listen(t), nil, nil))
}
