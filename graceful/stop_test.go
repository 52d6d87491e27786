package graceful

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

// From the start of the stop every answer closes its connection. This includes answers of
// handlers that were already running, whatever a handler does with its header.
func TestEveryAnswerClosesItsConnection(t *testing.T) {
	file, err := os.CreateTemp(t.TempDir(), "answer")
	require.NoError(t, err)
	defer file.Close()
	_, err = file.WriteString("0123456789")
	require.NoError(t, err)
	for name, answer := range map[string]func(w http.ResponseWriter){
		"nothing":      func(http.ResponseWriter) {},
		"Write":        func(w http.ResponseWriter) { w.Write([]byte("x")) },
		"WriteString":  func(w http.ResponseWriter) { io.WriteString(w, "x") },
		"WriteHeader":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
		"early hints":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusEarlyHints); io.WriteString(w, "x") },
		"Flush":        func(w http.ResponseWriter) { w.(http.Flusher).Flush() },
		"FlushError":   func(w http.ResponseWriter) { http.NewResponseController(w).Flush() },
		"ReadFrom":     func(w http.ResponseWriter) { io.Copy(w, io.NewSectionReader(file, 0, 10)) },
		"deleted":      func(w http.ResponseWriter) { w.Header().Del("Connection"); io.WriteString(w, "x") },
		"keep-alive":   func(w http.ResponseWriter) { w.Header().Set("Connection", "keep-alive"); io.WriteString(w, "x") },
		"set directly": func(w http.ResponseWriter) { w.Header()["Connection"] = nil; io.WriteString(w, "x") },
	} {
		t.Run(name, func(t *testing.T) {
			inside, stopping := make(chan bool), make(chan bool)
			ln := listen(t)
			r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				inside <- true
				<-stopping
				answer(w)
			})}, ln)
			c := dial(t, r.addr)
			c.send(get)
			<-inside
			idle := dial(t, r.addr) // its first request comes after the stop
			// Where new clients cannot be kept out, a connection can enter the queue after
			// the drain has found it empty, and then Close resets it.
			until(t, "the second connection", func() bool { return r.counts()[fresh] == 1 })
			r.stop()
			r.turningAway()
			close(stopping)
			resp, _ := c.answer()
			for resp.StatusCode == http.StatusEarlyHints {
				resp, _ = c.answer()
			}
			require.True(t, resp.Close, "no Connection: close in %v", resp.Header)
			c.closed()

			idle.send(get)
			<-inside
			resp, _ = idle.answer()
			for resp.StatusCode == http.StatusEarlyHints {
				resp, _ = idle.answer()
			}
			require.True(t, resp.Close)
			require.NoError(t, r.wait())
		})
	}
}

// A kept-alive connection stays open for the linger time. A request that arrives in that
// time gets its answer.
func TestLinger(t *testing.T) {
	r := start(t, &http.Server{Handler: hello}, listen(t), WithLinger(patience))
	c, other := dial(t, r.addr), dial(t, r.addr)
	for _, c := range []*client{c, other} {
		c.send(get)
		resp, _ := c.answer()
		require.False(t, resp.Close)
	}
	r.stop()
	r.turningAway()
	c.send(get)
	resp, body := c.answer()
	require.Equal(t, "hello", body)
	require.True(t, resp.Close)
	c.closed()
	other.Close() // otherwise Serve would wait for it
	require.NoError(t, r.wait())
}

// The same with every protocol. The server closes the connection after that answer, on
// HTTP/2 with a GOAWAY. Otherwise Serve would wait for it until the linger time ends.
func TestLingerInEveryProtocol(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			srv, serve := serverOf(protocol, hello)
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error {
				return serve(ctx, srv, ln, WithLinger(time.Minute), WithTimeout(time.Hour))
			})
			r.srv = srv
			tr, scheme := transportOf(protocol)
			defer tr.CloseIdleConnections()
			var connections atomic.Int64
			ask := func() {
				ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
					if !c.Reused {
						connections.Add(1)
					}
				}})
				req, err := http.NewRequestWithContext(ctx, "GET", scheme+"://"+r.addr, nil)
				require.NoError(t, err)
				resp, err := tr.RoundTrip(req)
				require.NoError(t, err)
				body, err := io.ReadAll(resp.Body)
				require.NoError(t, err)
				resp.Body.Close()
				require.Equal(t, "hello", string(body))
			}
			ask()
			r.stop()
			r.turningAway()
			ask()
			require.EqualValues(t, 1, connections.Load())
			require.NoError(t, r.wait())
		})
	}
}

func TestLingerEnds(t *testing.T) {
	t.Parallel()
	for _, linger := range []time.Duration{0, 50 * time.Millisecond} {
		r := start(t, &http.Server{Handler: hello}, listen(t), WithLinger(linger))
		c := dial(t, r.addr)
		c.send(get)
		c.answer()
		r.stop()
		c.closed()
		require.NoError(t, r.wait())
	}
}

// net/http regards an HTTP/2 connection as idle between its preface and its first
// request. The server must not close it before its first answer. The same holds for a
// connection that has only finished its TCP handshake.
func TestFirstAnswers(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			srv, serve := serverOf(protocol, hello)
			ln := listen(t)
			log := new(journal)
			r := begin(t, ln, func(ctx context.Context) error {
				return serve(ctx, srv, ln, part(patience), WithTimeout(time.Hour), log.option())
			})
			tr, scheme := transportOf(protocol)
			defer tr.CloseIdleConnections()
			connected, going := make(chan bool), make(chan bool)
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
				connected <- true
				<-going
			}})
			// The body cannot be sent twice, so the client cannot repeat a lost request.
			req, err := http.NewRequestWithContext(ctx, "POST", scheme+"://"+r.addr, io.MultiReader(strings.NewReader("x")))
			require.NoError(t, err)
			answered := make(chan error, 1)
			go func() {
				resp, err := tr.RoundTrip(req)
				if err == nil {
					var body []byte
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
					if string(body) != "hello" {
						err = fmt.Errorf("%q, %w", body, err)
					}
				}
				answered <- err
			}()
			<-connected
			r.stop()
			log.after(t, "drained")
			close(going)
			require.NoError(t, <-answered)
			require.NoError(t, r.wait())
		})
	}
}

// A client that sends nothing, or only a byte now and then, delays the stop for the time
// limit of its phase, and not longer.
func TestSilentClients(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols[:2] {
		t.Run(protocol, func(t *testing.T) {
			inside, going := make(chan bool), make(chan bool)
			srv, serve := serverOf(protocol, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				close(inside)
				<-going
			}))
			srv.ErrorLog = log.New(io.Discard, "", 0)
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error {
				return serve(ctx, srv, ln, part(100*time.Millisecond))
			})
			silent, slow := dial(t, r.addr), dial(t, r.addr)
			var dripping sync.WaitGroup
			dripping.Go(func() {
				text := get
				if protocol == "HTTPS" {
					text = "\x16\x03\x01\x02\x00" // the start of a record
				}
				drip := time.NewTicker(50 * time.Millisecond)
				defer drip.Stop()
				for i := range text {
					if _, err := slow.Write([]byte{text[i]}); err != nil {
						return
					}
					<-drip.C
				}
			})
			var busy net.Conn = dial(t, r.addr)
			if protocol == "HTTPS" {
				busy = tls.Client(busy, trusting)
			}
			_, err := io.WriteString(busy, get)
			require.NoError(t, err)
			<-inside
			r.stop()
			// The server waits for another request meanwhile. Shutdown alone would close
			// this connection after 5 s.
			require.NoError(t, silent.SetDeadline(time.Now().Add(4*time.Second)))
			silent.closed()
			close(going)
			err = r.wait()
			var cut *Error
			require.ErrorAs(t, err, &cut)
			require.Equal(t, Error{BeforeFirstAnswer: 1, err: cut.err}, *cut, "only one client has begun to send")
			require.ErrorIs(t, err, context.DeadlineExceeded)
			slow.Close()
			dripping.Wait()
		})
	}
}

// On an HTTP/2 connection without a request the server sends a GOAWAY, which says that
// it has processed no request.
func TestSilentHTTP2(t *testing.T) {
	t.Parallel()
	srv, serve := serverOf("h2c", hello)
	ln := listen(t)
	r := begin(t, ln, func(ctx context.Context) error {
		return serve(ctx, srv, ln, part(100*time.Millisecond))
	})
	r.srv = srv
	c := dial(t, r.addr)
	c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00") // preface, empty SETTINGS
	_, err := c.r.Peek(9)
	require.NoError(t, err)
	until(t, "the preface", func() bool { return r.counts()[greeted] == 1 })
	r.stop()
	require.NoError(t, r.wait())
	frames, err := io.ReadAll(c.r)
	require.NoError(t, err)
	require.Contains(t, string(frames), "\x00\x00\x08\x07\x00\x00\x00\x00\x00"+"\x00\x00\x00\x00\x00\x00\x00\x00", "no GOAWAY with last stream 0 and no error")
}

func TestHandlerThatHangs(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			inside := make(chan bool)
			srv, serve := serverOf(protocol, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				close(inside)
				<-r.Context().Done()
			}))
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error {
				return serve(ctx, srv, ln, WithTimeout(250*time.Millisecond))
			})
			tr, scheme := transportOf(protocol)
			defer tr.CloseIdleConnections()
			lost := sentBy(tr, scheme+"://"+r.addr)
			<-inside
			r.stop()
			err := r.wait()
			var cut *Error
			require.ErrorAs(t, err, &cut)
			require.Equal(t, Error{Active: 1, err: cut.err}, *cut)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Error(t, <-lost)
		})
	}
}

// Serve returns even if a handler hangs. The functions of the user are called later too.
func TestHandlerThatHangsOn(t *testing.T) {
	inside, going, closed := make(chan bool), make(chan bool), make(chan bool)
	srv := &http.Server{
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			close(inside)
			<-going
		}),
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				close(closed)
			}
		},
	}
	r := start(t, srv, listen(t), WithTimeout(time.Millisecond))
	dial(t, r.addr).send(get)
	<-inside
	r.stop()
	var cut *Error
	require.ErrorAs(t, r.wait(), &cut)
	require.Equal(t, 1, cut.Active)
	close(going)
	<-closed // the ConnState function of the user is still called
}

func TestHandlerThatPanics(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			inside, stopping := make(chan bool), make(chan bool)
			srv, serve := serverOf(protocol, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				close(inside)
				<-stopping
				panic(http.ErrAbortHandler)
			}))
			ln := listen(t)
			r := begin(t, ln, func(ctx context.Context) error { return serve(ctx, srv, ln, WithLinger(0)) })
			tr, scheme := transportOf(protocol)
			defer tr.CloseIdleConnections()
			lost := sentBy(tr, scheme+"://"+r.addr)
			<-inside
			r.stop()
			close(stopping)
			require.NoError(t, r.wait())
			require.Error(t, <-lost)
		})
	}
}

// A broken listener fails when the test tells it to.
type broken struct {
	net.Listener
	fail chan error
}

func (b broken) Accept() (net.Conn, error) {
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := b.Listener.Accept(); err == nil {
			accepted <- c
		}
		close(accepted)
	}()
	select {
	case c, ok := <-accepted:
		if ok {
			return c, nil
		}
		return nil, net.ErrClosed
	case err := <-b.fail:
		return nil, err
	}
}

func TestAcceptError(t *testing.T) {
	inside, going := make(chan bool), make(chan bool)
	ln := broken{listen(t), make(chan error)}
	log := new(journal)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(inside)
		<-going
		io.WriteString(w, "hello")
	})}, ln, log.option())
	c := dial(t, r.addr)
	c.send(get)
	<-inside
	failure := errors.New("no more")
	ln.fail <- failure
	log.after(t, "stopping")
	close(going)
	_, body := c.answer()
	require.Equal(t, "hello", body, "the answer to the current request")
	require.Equal(t, failure, r.wait())
}

// The second context ends the stop in every phase.
func TestAbort(t *testing.T) {
	forever := WithTimeout(time.Hour)
	for _, test := range []struct {
		phase string // the phase that is aborted
		after string // the phase before it
		opts  []Option
		cut   Error
	}{
		{phase: "delayed", after: "stopping", opts: []Option{WithDelay(time.Minute)}, cut: Error{Active: 1}},
		{phase: "idle closed", after: "stopping", opts: []Option{WithLinger(time.Minute)}, cut: Error{Active: 1}},
		{phase: "first requests", after: "drained", opts: []Option{WithLinger(0), part(time.Minute)}, cut: Error{Active: 1}},
		{phase: "shut down", after: "first requests", opts: []Option{WithLinger(0), part(time.Millisecond)}, cut: Error{Active: 1}},
	} {
		t.Run(test.phase, func(t *testing.T) {
			inside := make(chan bool)
			log, reason := new(journal), errors.New("enough")
			now, abort := context.WithCancelCause(context.Background())
			defer abort(nil)
			r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/hang" {
					close(inside)
					<-r.Context().Done()
				}
			})}, listen(t), append(test.opts, forever, WithAbort(now), log.option())...)
			kept := dial(t, r.addr)
			kept.send(get)
			kept.answer()
			hanging := dial(t, r.addr)
			hanging.send("GET /hang HTTP/1.1\r\nHost: test\r\n\r\n")
			<-inside
			silent := dial(t, r.addr)
			until(t, "the silent client and the idle one", func() bool {
				n := r.counts()
				return n[fresh] == 1 && n[idle] == 1
			})
			r.stop()
			log.after(t, test.after)
			require.Nil(t, log.line(test.phase), "the phase ended before the abort")
			abort(reason)
			err := r.wait()
			var cut *Error
			require.ErrorAs(t, err, &cut)
			test.cut.err = cut.err
			require.Equal(t, test.cut, *cut)
			if test.phase != "shut down" { // the time limit of the silent client has ended
				require.NotErrorIs(t, err, context.DeadlineExceeded)
			}
			require.ErrorIs(t, err, reason)
			for _, c := range []*client{kept, hanging, silent} {
				c.closed()
			}
		})
	}
}

// The second context stops the server even if the first has not ended.
func TestAbortAlone(t *testing.T) {
	now, abort := context.WithCancel(context.Background())
	r := start(t, &http.Server{}, listen(t), WithAbort(now))
	abort()
	require.NoError(t, r.wait(), "nothing was cut off")
}

// The functions and other fields of the user's server work while Serve runs.
func TestServerFields(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			type key struct{ name string }
			var (
				mu     sync.Mutex
				states []http.ConnState
				based  net.Listener
			)
			down := make(chan bool)
			srv, serve := serverOf(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprint(w, r.Context().Value(key{"base"}), r.Context().Value(key{"conn"}), r.Context().Value(http.ServerContextKey) != nil)
			}))
			srv.BaseContext = func(ln net.Listener) context.Context {
				based = ln
				return context.WithValue(context.Background(), key{"base"}, "based ")
			}
			srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
				return context.WithValue(ctx, key{"conn"}, c != nil)
			}
			srv.ConnState = func(_ net.Conn, state http.ConnState) {
				mu.Lock()
				defer mu.Unlock()
				states = append(states, state)
			}
			srv.RegisterOnShutdown(func() { close(down) })
			ln, err := net.Listen("tcp", "127.0.0.1:0") // is wrapped
			require.NoError(t, err)
			r := begin(t, ln, func(ctx context.Context) error { return serve(ctx, srv, ln, WithLinger(0)) })
			tr, scheme := transportOf(protocol)
			defer tr.CloseIdleConnections()
			resp, err := (&http.Client{Transport: tr}).Get(scheme + "://" + r.addr)
			require.NoError(t, err)
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			require.NoError(t, err)
			require.Equal(t, "based true true", string(body))
			tr.CloseIdleConnections()
			r.stop()
			require.NoError(t, r.wait())
			<-down
			if scheme == "http" {
				require.Same(t, ln, based)
			}
			mu.Lock()
			defer mu.Unlock()
			require.Equal(t, http.StateNew, states[0])
			require.Equal(t, http.StateClosed, states[len(states)-1])
		})
	}
}

func TestTwice(t *testing.T) {
	srv := &http.Server{Handler: hello}
	r := start(t, srv, listen(t))
	c := dial(t, r.addr)
	c.send(get)
	c.answer()
	second := listen(t)
	require.ErrorIs(t, Serve(t.Context(), srv, second), errTwice)
	require.ErrorIs(t, second.Close(), net.ErrClosed, "Serve must close the second listener")
	c.send(get) // the first listener is still served
	c.answer()
	c.Close()
	r.stop()
	require.NoError(t, r.wait())
	require.ErrorIs(t, Serve(t.Context(), srv, listen(t)), http.ErrServerClosed)
}

// If other code shuts the server down, Serve returns the same error as that of net/http.
func TestShutdownByOthers(t *testing.T) {
	for name, end := range map[string]func(*http.Server) error{
		"Shutdown": func(srv *http.Server) error { return srv.Shutdown(context.Background()) },
		"Close":    (*http.Server).Close,
	} {
		t.Run(name, func(t *testing.T) {
			srv := &http.Server{Handler: hello}
			r := start(t, srv, listen(t))
			c := dial(t, r.addr)
			c.send(get)
			c.answer()
			require.NoError(t, end(srv))
			require.Equal(t, http.ErrServerClosed, r.wait())
			c.closed()
		})
	}
}

// wrapped is a listener like those of packages for the PROXY protocol: its field is
// exported.
type wrapped struct{ Listener net.Listener }

func (w *wrapped) Accept() (net.Conn, error) { return w.Listener.Accept() }
func (w *wrapped) Addr() net.Addr            { return w.Listener.Addr() }
func (w *wrapped) Close() error              { return w.Listener.Close() }

// hidden is a listener that hides the listener below it from Serve.
type hidden struct{ net.Listener }
type door1 struct{ inner hidden }

func (d door1) Accept() (net.Conn, error) { return d.inner.Accept() }
func (d door1) Addr() net.Addr            { return d.inner.Addr() }
func (d door1) Close() error              { return d.inner.Close() }

func TestListeners(t *testing.T) {
	shards := func(t *testing.T) *acceptq.Shards {
		s, err := acceptq.ListenTCPShards("127.0.0.1:0", 4)
		if errors.Is(err, errors.ErrUnsupported) {
			s, err = acceptq.ListenTCPShards("127.0.0.1:0", 1)
		}
		require.NoError(t, err)
		return s
	}
	plain := func(t *testing.T) net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		return ln
	}
	for name, test := range map[string]struct {
		listen  func(t *testing.T) (Listener, []Option)
		tls     bool
		drained int // sockets
	}{
		"ours":   {func(t *testing.T) (Listener, []Option) { return listen(t), nil }, false, 1},
		"Shards": {func(t *testing.T) (Listener, []Option) { return shards(t), nil }, false, 1},
		"net's":  {func(t *testing.T) (Listener, []Option) { return plain(t), nil }, false, 1},
		"TLS":    {func(t *testing.T) (Listener, []Option) { return tls.NewListener(listen(t), tlsConfig()), nil }, true, 1},
		"PROXY":  {func(t *testing.T) (Listener, []Option) { return &wrapped{listen(t)}, nil }, false, 1},
		"both": {func(t *testing.T) (Listener, []Option) {
			return tls.NewListener(&wrapped{listen(t)}, tlsConfig()), nil
		}, true, 1},
		"TLS, net": {func(t *testing.T) (Listener, []Option) { return tls.NewListener(plain(t), tlsConfig()), nil }, true, 0},
		"hidden":   {func(t *testing.T) (Listener, []Option) { return door1{hidden{listen(t)}}, nil }, false, 0},
		"named": {func(t *testing.T) (Listener, []Option) {
			ln := listen(t)
			return door1{hidden{ln}}, []Option{WithSocket(ln)}
		}, false, 1},
		"several": {func(t *testing.T) (Listener, []Option) {
			return listen(t), []Option{WithListener(listen(t), plain(t), shards(t))}
		}, false, 4},
		"unix": {func(t *testing.T) (Listener, []Option) {
			ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Skip(err)
			}
			return ln, nil
		}, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ln, opts := test.listen(t)
			o, err := newOptions(opts, false)
			require.NoError(t, err)
			s := &server{options: o}
			lns := append([]Listener{ln}, o.listeners...)
			require.NoError(t, s.open(lns))
			require.Len(t, s.sockets, test.drained)

			log := new(journal)
			r := start(t, &http.Server{Handler: hello}, ln, append(opts, log.option())...)
			for _, ln := range lns {
				nc, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
				require.NoError(t, err)
				defer nc.Close()
				if test.tls {
					nc = tls.Client(nc, trusting)
				}
				c := newClient(t, nc)
				c.send(get)
				_, body := c.answer()
				require.Equal(t, "hello", body)
				c.Close()
			}
			r.stop()
			require.NoError(t, r.wait())
			for _, phase := range []string{"stopping", "idle closed", "drained", "first requests", "shut down"} {
				require.NotNil(t, log.line(phase), phase)
			}
			for _, ln := range lns {
				_, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
				require.Error(t, err, "%v is still open", ln)
			}
		})
	}
}

// If a listener cannot keep clients out, Serve closes it before it waits for first
// requests: a client that connected in that time would be reset.
func TestExposedListenerIsClosedEarly(t *testing.T) {
	log := new(journal)
	ln := listen(t)
	r := start(t, &http.Server{Handler: hello}, door1{hidden{ln}}, log.option())
	c := dial(t, r.addr)
	until(t, "the client", func() bool {
		return r.counts()[fresh] == 1
	})
	r.stop()
	log.after(t, "drained")
	require.ErrorIs(t, ln.Close(), net.ErrClosed)
	c.send(get)
	c.answer()
	require.NoError(t, r.wait())
}

// A late is a listener whose Accept returns a connection after Close.
type late struct {
	net.Listener
	closed chan bool
	log    *journal
	once   *sync.Once
	taken  chan bool // closed when the connection is accepted
}

func (l late) Accept() (nc net.Conn, err error) {
	l.once.Do(func() {
		nc, err = l.Listener.Accept()
		close(l.taken)
		<-l.closed
		for l.log.line("drained") == nil {
			time.Sleep(time.Millisecond)
		}
	})
	if nc == nil && err == nil {
		err = net.ErrClosed
	}
	return nc, err
}

func (l late) Close() error {
	close(l.closed) // twice, it would panic
	return l.Listener.Close()
}

func TestConnectionAcceptedAfterClose(t *testing.T) {
	log := new(journal)
	ln := listen(t)
	taken := make(chan bool)
	r := start(t, &http.Server{Handler: hello}, &struct{ late }{late{door1{hidden{ln}}, make(chan bool), log, new(sync.Once), taken}}, log.option())
	c := dial(t, r.addr)
	c.send(get)
	<-taken // otherwise Close can come before the connection
	r.stop()
	_, body := c.answer()
	require.Equal(t, "hello", body)
	require.NoError(t, r.wait())
}

// A socket with another holder is closed at once. The other holder gets the queued
// connections.
func TestSharedSocket(t *testing.T) {
	ln := listen(t)
	f, err := ln.File()
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	heir, err := net.FileListener(f)
	require.NoError(t, err)
	defer heir.Close()
	log := new(journal)
	inside, going := make(chan bool), make(chan bool)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(inside)
		<-going
		io.WriteString(w, "old")
	})}, ln, WithSharedSocket(), log.option())
	old := dial(t, r.addr)
	old.send(get)
	<-inside
	r.stop()
	log.after(t, "idle closed")
	c := dial(t, r.addr)
	next, err := heir.Accept()
	require.NoError(t, err)
	defer next.Close()
	require.Equal(t, c.LocalAddr().String(), next.RemoteAddr().String())
	close(going)
	_, body := old.answer()
	require.Equal(t, "old", body)
	require.NoError(t, r.wait())
	require.Nil(t, log.line("drained"))
}

// Serve waits for the handler of a hijacked connection. A function of
// RegisterOnShutdown tells the handler to end.
func TestHijacked(t *testing.T) {
	inside, down := make(chan bool), make(chan bool)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		close(inside)
		<-down
		io.WriteString(c, "bye")
	})}
	srv.RegisterOnShutdown(func() { close(down) })
	r := start(t, srv, listen(t))
	c := dial(t, r.addr)
	c.send(get)
	<-inside
	r.stop()
	require.NoError(t, r.wait())
	resp, err := http.ReadResponse(c.r, nil)
	require.NoError(t, err)
	require.Equal(t, "Upgrade", resp.Header.Get("Connection"))
	rest, err := io.ReadAll(c.r)
	require.NoError(t, err)
	require.Equal(t, "bye", string(rest))
}

func TestHijackedAndNotTold(t *testing.T) {
	inside, going := make(chan bool), make(chan bool)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, _, _ := w.(http.Hijacker).Hijack()
		defer c.Close()
		close(inside)
		<-going
	})}, listen(t), WithTimeout(250*time.Millisecond))
	dial(t, r.addr).send(get)
	<-inside
	r.stop()
	var cut *Error
	require.ErrorAs(t, r.wait(), &cut)
	require.Equal(t, 1, cut.Active)
	close(going)
}

// The ResponseWriter of a handler has the same methods as that of net/http.
func TestResponseWriterHasTheSameMethods(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			var theirs, ours []string
			handler := func(methods *[]string) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					for m := range reflect.TypeOf(w).Methods() {
						*methods = append(*methods, m.Name)
					}
				})
			}
			ask := func(addr string) {
				tr, scheme := transportOf(protocol)
				defer tr.CloseIdleConnections()
				resp, err := (&http.Client{Transport: tr}).Get(scheme + "://" + addr)
				require.NoError(t, err)
				resp.Body.Close()
			}
			ln := listen(t)
			srv, serve := serverOf(protocol, handler(&ours))
			r := begin(t, ln, func(ctx context.Context) error { return serve(ctx, srv, ln, WithLinger(0)) })
			ask(r.addr)
			r.stop()
			require.NoError(t, r.wait())

			srv, _ = serverOf(protocol, handler(&theirs))
			bare := listen(t)
			done := make(chan error, 1)
			go func() {
				if srv.TLSConfig != nil {
					done <- srv.ServeTLS(bare, "", "")
				} else {
					done <- srv.Serve(bare)
				}
			}()
			ask(bare.Addr().String())
			require.NoError(t, srv.Close())
			<-done
			require.ElementsMatch(t, append(theirs, "Unwrap"), ours)
		})
	}
}

// The certificate comes from files.
func TestServeTLS(t *testing.T) {
	certFile, keyFile := certFiles(t)
	srv := &http.Server{Handler: hello}
	ln := listen(t)
	r := begin(t, ln, func(ctx context.Context) error { return ServeTLS(ctx, srv, ln, certFile, keyFile) })
	tr, _ := transportOf("HTTP/2")
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get("https://" + r.addr)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	tr.CloseIdleConnections()
	r.stop()
	require.NoError(t, r.wait())
}

func TestOptionsAsterisk(t *testing.T) {
	for _, off := range []bool{false, true} {
		var calls atomic.Int64
		r := start(t, &http.Server{
			Handler:                      http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls.Add(1) }),
			DisableGeneralOptionsHandler: off,
		}, listen(t))
		c := dial(t, r.addr)
		c.send("OPTIONS * HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\nx")
		resp, _ := c.answer()
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Zero(t, resp.ContentLength)
		require.Equal(t, off, calls.Load() == 1)
		c.Close()
		r.stop()
		require.NoError(t, r.wait())
	}
}

// During the delay the server serves as before.
func TestDelay(t *testing.T) {
	t.Parallel()
	stopped := make(chan bool)
	log := new(journal)
	r := start(t, &http.Server{Handler: hello}, listen(t), log.option(),
		WithOnStop(func() { close(stopped) }), WithDelay(200*time.Millisecond), WithLinger(0))
	c := dial(t, r.addr)
	r.stop()
	<-stopped
	c.send(get)
	resp, _ := c.answer()
	if log.line("delayed") == nil { // otherwise this machine was too slow to see it
		require.False(t, resp.Close)
	}
	require.NoError(t, r.wait())
	require.GreaterOrEqual(t, log.line("delayed")["took"], 200*time.Millisecond)
}

func TestLog(t *testing.T) {
	var text bytes.Buffer
	inside := make(chan bool)
	r := start(t, &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(inside)
		<-r.Context().Done()
	})}, listen(t), WithTimeout(100*time.Millisecond), WithLogger(slog.New(slog.NewTextHandler(&text, nil))))
	dial(t, r.addr).send(get)
	<-inside
	r.stop()
	require.Error(t, r.wait())
	lines := strings.Split(strings.TrimSpace(text.String()), "\n")
	if runtime.GOOS != "linux" { // no other system can keep new clients out
		extra := slices.IndexFunc(lines, func(line string) bool {
			return strings.Contains(line, `level=INFO msg="graceful: cannot keep new clients out" error=`)
		})
		require.Equal(t, 2, extra, "before the line of the drain: %s", &text)
		lines = slices.Delete(lines, extra, extra+1)
	}
	require.Len(t, lines, 5, text.String())
	for i, part := range []string{
		`level=INFO msg="graceful: stopping" queued=0 before_first_answer=0 active=1 idle=0`,
		`level=INFO msg="graceful: idle closed" took=`,
		`level=INFO msg="graceful: drained" took=`,
		`level=INFO msg="graceful: first requests" took=`,
		`level=WARN msg="graceful: shut down" took=`,
	} {
		require.Contains(t, lines[i], part)
	}
	require.Contains(t, lines[4], `error="context deadline exceeded"`)
}

func TestWrongUse(t *testing.T) {
	var none struct {
		ctx context.Context
		ln  *acceptq.Listener
	}
	for name, use := range map[string]func(ln Listener) error{
		"no context":      func(ln Listener) error { return Serve(none.ctx, &http.Server{}, ln) },
		"no server":       func(ln Listener) error { return Serve(t.Context(), nil, ln) },
		"no TLS server":   func(ln Listener) error { return ServeTLS(t.Context(), nil, ln, "", "") },
		"no listener":     func(ln Listener) error { return Serve(t.Context(), &http.Server{}, nil, WithListener(ln)) },
		"no more":         func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithListener(nil)) },
		"zero shards":     func(ln Listener) error { ln.Close(); return Serve(t.Context(), &http.Server{}, new(acceptq.Shards)) },
		"no kind":         func(ln Listener) error { return Serve(t.Context(), &http.Server{}, odd{ln}) },
		"delay":           func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithDelay(time.Hour)) },
		"negative delay":  func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithDelay(-1)) },
		"negative linger": func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithLinger(-1)) },
		"no time":         func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithTimeout(0)) },
		"no abort":        func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithAbort(none.ctx)) },
		"no socket":       func(ln Listener) error { return Serve(t.Context(), &http.Server{}, ln, WithSocket(none.ln)) },
		"no certificate":  func(ln Listener) error { return ServeTLS(t.Context(), &http.Server{}, ln, "", "") },
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			require.Error(t, use(ln))
			require.ErrorIs(t, ln.Close(), net.ErrClosed, "it was not closed")
		})
	}
	r := start(t, &http.Server{}, listen(t), nil, WithLogger(nil), WithOnStop(nil))
	r.stop()
	require.NoError(t, r.wait())
}

// odd is neither a net.Listener nor Shards.
type odd struct{ ln Listener }

func (o odd) Addr() net.Addr { return o.ln.Addr() }
func (o odd) Close() error   { return o.ln.Close() }
