package graceful

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A connection that has been answered has its linger even if net/http reports late that it
// is idle. Here the function of the caller delays the report.
func TestAnsweredConnectionThatIsNotReportedIdle(t *testing.T) {
	late, going := make(chan bool, 2), make(chan bool)
	log := new(journal)
	r := start(t, &http.Server{Handler: hello, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateIdle {
			late <- true
			<-going
		}
	}}, listen(t), WithLinger(patience), WithTimeout(time.Hour), log.option())
	c := dial(t, r.addr)
	c.send(get)
	resp, _ := c.answer()
	require.False(t, resp.Close)
	<-late
	r.stop()
	r.turningAway()
	require.Never(t, func() bool { return log.line("idle closed") != nil }, 20*time.Millisecond, time.Millisecond)
	close(going)
	c.send(get)
	_, body := c.answer()
	require.Equal(t, "hello", body)
	require.NoError(t, r.wait())
}

// A limited listener has n connections open at most, like that of netutil.LimitListener.
type limited struct {
	net.Listener
	free chan bool
	done chan struct{}
	once sync.Once
}

func limit(ln net.Listener, n int) *limited {
	return &limited{Listener: ln, free: make(chan bool, n), done: make(chan struct{})}
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- true:
	case <-l.done:
		return nil, net.ErrClosed
	}
	nc, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &limitedConn{Conn: nc, end: func() { <-l.free }}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	once sync.Once
	end  func()
}

func (c *limitedConn) Close() error {
	defer c.once.Do(c.end)
	return c.Conn.Close()
}

// Idle connections of HTTP/1 are closed when the linger ends. Silent connections and those of
// HTTP/2 are when nothing else moves: Accept may wait for their end.
func TestConnectionsAtRestDoNotBlockTheDrain(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(c *client){
		"idle":   func(c *client) { c.send(get); c.answer() },
		"silent": func(*client) {},
		"HTTP/2": nil,
	} {
		t.Run(name, func(t *testing.T) {
			if name != "idle" && runtime.GOOS != "linux" {
				t.Skip("the system does not tell whether a client is silent")
			}
			ln := listen(t)
			if err := ln.Drain(t.Context()); errors.Is(err, errors.ErrUnsupported) {
				t.Skip(err)
			}
			require.NoError(t, ln.Resume())
			srv, _ := serverOf("h2c", hello)
			r := start(t, srv, limit(ln, 2), WithLinger(10*time.Millisecond), part(200*time.Millisecond))
			for range 2 {
				if first != nil {
					first(dial(t, r.addr))
					continue
				}
				tr, _ := transportOf("h2c")
				defer tr.CloseIdleConnections()
				resp, err := (&http.Client{Transport: tr}).Get("http://" + r.addr)
				require.NoError(t, err)
				_, err = io.Copy(io.Discard, resp.Body)
				require.NoError(t, err)
				resp.Body.Close()
			}
			until(t, "two connections", func() bool { return r.counts().open() == 2 })
			var queued []*client
			for range 4 {
				queued = append(queued, dial(t, r.addr))
				queued[len(queued)-1].send(get)
			}
			r.stop()
			for _, c := range queued {
				_, body := c.answer()
				require.Equal(t, "hello", body)
			}
			require.NoError(t, r.wait())
		})
	}
}

// A connection that comes to rest when the linger of the others has ended gets its own.
func TestConnectionThatRestsLater(t *testing.T) {
	t.Parallel()
	flushed, going := make(chan bool), make(chan bool)
	log := new(journal)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			w.(http.Flusher).Flush()
			close(flushed)
			<-going
		}
		io.WriteString(w, "hello")
	})}, listen(t), WithLinger(200*time.Millisecond), part(time.Minute), WithTimeout(time.Hour), log.option())
	silent := dial(t, r.addr) // keeps the stop before its last phase
	c := dial(t, r.addr)
	c.send("GET /slow HTTP/1.1\r\nHost: test\r\n\r\n")
	<-flushed
	until(t, "the silent client", func() bool { return r.counts()[fresh] == 1 })
	r.stop()
	log.after(t, "drained")
	close(going)
	resp, _ := c.answer()
	require.False(t, resp.Close, "the header came before the stop")
	c.send(get)
	_, body := c.answer()
	require.Equal(t, "hello", body)
	silent.send(get)
	silent.answer()
	require.NoError(t, r.wait())
}

// A kept-alive connection on which a part of a request has arrived is not idle.
func TestRequestThatBegan(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the system does not tell what came last")
	}
	for _, protocol := range protocols[:2] {
		for name, when := range map[string]struct{ early, body bool }{
			"before the stop":                 {true, false},
			"in the linger":                   {false, false},
			"in the linger, after a body":     {false, true},
			"before the stop, no linger then": {true, false},
		} {
			t.Run(protocol+", "+name, func(t *testing.T) {
				srv, serve := serverOf(protocol, hello)
				ln := listen(t)
				log := new(journal)
				linger := 100 * time.Millisecond
				if name == "before the stop, no linger then" {
					linger = 0
				}
				r := begin(t, ln, func(ctx context.Context) error {
					return serve(ctx, srv, ln, WithLinger(linger), part(time.Minute), WithTimeout(time.Hour), log.option())
				})
				r.srv = srv
				c := dial(t, r.addr)
				if protocol == "HTTPS" {
					c = newClient(t, tls.Client(c.Conn, trusting))
				}
				if when.body {
					c.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\nx")
				} else {
					c.send(get)
				}
				c.answer()
				until(t, "the idle connection", func() bool { return r.counts()[idle] == 1 })
				time.Sleep(50 * time.Millisecond) // the kernel's clock ticks
				half := len(get) / 2
				if when.early {
					c.send(get[:half])
					time.Sleep(20 * time.Millisecond)
				}
				r.stop()
				r.turningAway()
				if !when.early {
					c.send(get[:half])
				}
				log.after(t, "drained")
				c.send(get[half:])
				_, body := c.answer()
				require.Equal(t, "hello", body)
				require.NoError(t, r.wait())
			})
		}
	}
}

// A function in TLSNextProto is waited for, though net/http does not report its connection.
func TestProtocolOfTheUser(t *testing.T) {
	inside, going := make(chan bool), make(chan bool)
	srv := &http.Server{TLSConfig: tlsConfig(), TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){
		"mine/1": func(_ *http.Server, c *tls.Conn, _ http.Handler) {
			line, _ := bufio.NewReader(c).ReadString('\n')
			close(inside)
			<-going
			fmt.Fprintf(c, "answer to %s", line)
		},
	}}
	srv.TLSConfig.NextProtos = []string{"mine/1"}
	theirs := fmt.Sprint(srv.TLSNextProto)
	functions := srv.TLSNextProto
	ln := listen(t)
	log := new(journal)
	r := begin(t, ln, func(ctx context.Context) error {
		return ServeTLS(ctx, srv, ln, "", "", part(10*time.Millisecond), WithLinger(0), log.option())
	})
	config := trusting.Clone()
	config.NextProtos = []string{"mine/1"}
	c := newClient(t, tls.Client(dial(t, r.addr).Conn, config))
	c.send("request\n")
	<-inside
	r.stop()
	log.after(t, "first requests")
	require.EqualValues(t, 1, log.line("first requests")["active"])
	close(going)
	line, err := c.r.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "answer to request\n", line)
	require.NoError(t, r.wait())
	require.Equal(t, theirs, fmt.Sprint(functions), "the map of the caller")
}

// A drain goes on while the queue shrinks or requests are being answered.
func TestDrainGoesOnWhileItMoves(t *testing.T) {
	t.Parallel()
	const wait = 160 * time.Millisecond
	for name, test := range map[string]struct {
		clients int
		slow    time.Duration // accepting each client takes this time
		held    time.Duration // answering a request takes this time
	}{
		"the queue shrinks": {clients: 20, slow: wait / 8},
		"a request":         {clients: 2, held: 3 * wait},
	} {
		t.Run(name, func(t *testing.T) {
			var opens atomic.Int64
			ln := listen(t)
			if err := ln.Drain(t.Context()); errors.Is(err, errors.ErrUnsupported) {
				t.Skip(err)
			}
			require.NoError(t, ln.Resume())
			var wrapped net.Listener = ln
			if test.held > 0 {
				wrapped = limit(ln, 1)
			}
			r := start(t, &http.Server{
				ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
					opens.Add(1)
					time.Sleep(test.slow)
					return ctx
				},
				Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					time.Sleep(test.held)
					io.WriteString(w, "hello")
				}),
			}, wrapped, WithLinger(0), part(wait))
			var clients []*client
			for range test.clients {
				c := dial(t, r.addr)
				c.send(get)
				clients = append(clients, c)
			}
			until(t, "a client", func() bool { return opens.Load() > 0 })
			r.stop()
			for _, c := range clients {
				_, body := c.answer()
				require.Equal(t, "hello", body)
			}
			require.NoError(t, r.wait())
		})
	}
}

// A connection may have a type that cannot be the key of a map.
type tagged struct {
	net.Conn
	tags []string
}

type tagger struct{ net.Listener }

func (l tagger) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return tagged{nc, nil}, nil
}

func TestConnectionsOfAnyType(t *testing.T) {
	var seen [3]net.Conn
	r := start(t, &http.Server{
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context { seen[0] = nc; return ctx },
		ConnState:   func(nc net.Conn, _ http.ConnState) { seen[1] = nc },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			nc, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				seen[2] = nc
				io.WriteString(nc, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
				nc.Close()
			}
		}),
	}, tagger{listen(t)})
	c := dial(t, r.addr)
	c.send(get)
	_, body := c.answer()
	require.Equal(t, "hello", body)
	r.stop()
	require.NoError(t, r.wait())
	for _, nc := range seen {
		require.IsType(t, tagged{}, nc)
	}
}

// A client may open an HTTP/2 stream and reset it at once. Its handler may begin when net/http
// has already reported that the connection is idle again, and it is idle when the handler ends.
func TestStreamsThatAreReset(t *testing.T) {
	t.Parallel()
	srv, _ := serverOf("h2c", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	r := start(t, srv, listen(t), WithLinger(0), WithTimeout(2*time.Second))
	const (
		preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
		open    = "\x00\x00\x09\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x04test" // GET http://test/
		reset   = "\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08"
	)
	for range 200 {
		c := dial(t, r.addr)
		c.send(preface + open + reset)
	}
	until(t, "the connections", func() bool { return r.counts()[idle] == 200 })
	r.stop()
	require.NoError(t, r.wait())
}
