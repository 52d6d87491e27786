package graceful

import (
	"bufio"
	"cmp"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// ServeHTTP is the Handler of the server while Serve runs.
func (h *httpServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c, ok := r.Context().Value(h).(*conn); ok {
		c.begin()
		defer c.end(r.Context())
		if body := r.ContentLength != 0; c.body.Load() != body {
			c.body.Store(body)
		}
	}
	handler := h.user.handler
	if handler == nil {
		handler = http.DefaultServeMux
	}
	if !h.user.noOptions && r.RequestURI == "*" && r.Method == http.MethodOptions {
		handler = http.HandlerFunc(generalOptions)
	}
	switch w := w.(type) {
	case http1Writer:
		a := &http1Answer{answer{w, &h.conns, false}}
		handler.ServeHTTP(a, r)
		a.header()
	case http2Writer:
		a := &http2Answer{answer{w, &h.conns, false}}
		handler.ServeHTTP(a, r)
		a.header()
	default: // not a ResponseWriter of the current net/http
		if h.conns.stopping.Load() {
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	}
}

// generalOptions answers OPTIONS with the target "*" as net/http does.
func generalOptions(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "0") }

// The ResponseWriter of a handler must implement the same interfaces as the one of
// net/http, and no others: http.Flusher, io.ReaderFrom for sendfile, http.Hijacker on
// HTTP/1 only, http.Pusher on HTTP/2 only.
type (
	commonWriter interface {
		http.ResponseWriter
		io.StringWriter
		http.Flusher
		FlushError() error
		CloseNotify() <-chan bool
		SetReadDeadline(time.Time) error
		SetWriteDeadline(time.Time) error
		EnableFullDuplex() error
	}
	http1Writer interface {
		commonWriter
		io.ReaderFrom
		http.Hijacker
	}
	http2Writer interface {
		commonWriter
		http.Pusher
	}
)

// An answer marks the answer of a handler so that net/http closes the connection after it.
// On HTTP/2 the same header makes net/http send a GOAWAY frame.
type answer struct {
	commonWriter
	conns *conns
	done  bool // net/http has read the header
}

func (a *answer) header() {
	if !a.done && a.conns.stopping.Load() {
		a.Header().Set("Connection", "close")
	}
	a.done = true
}

func (a *answer) Unwrap() http.ResponseWriter { return a.commonWriter }

// WriteHeader calls header, except for an informational answer, which precedes the header.
// An answer with status 101 needs its own "Connection: Upgrade".
func (a *answer) WriteHeader(code int) {
	if code >= 200 {
		a.header()
	}
	a.commonWriter.WriteHeader(code)
}

func (a *answer) Write(p []byte) (int, error) {
	a.header()
	return a.commonWriter.Write(p)
}

func (a *answer) WriteString(p string) (int, error) {
	a.header()
	return a.commonWriter.WriteString(p)
}

func (a *answer) Flush() { a.FlushError() }

func (a *answer) FlushError() error {
	a.header()
	return a.commonWriter.FlushError()
}

type http1Answer struct{ answer }

// firstLen is as many bytes as net/http reads to detect the type of the content.
const firstLen = 512

var firsts = sync.Pool{New: func() any { return new([firstLen]byte) }}

// ReadFrom waits for the first bytes before it calls header: the source may be slow.
func (a *http1Answer) ReadFrom(r io.Reader) (n int64, err error) {
	if !a.done {
		first := firsts.Get().(*[firstLen]byte)
		defer firsts.Put(first)
		for n == 0 && err == nil {
			var read int
			if read, err = r.Read(first[:]); read > 0 {
				written, werr := a.Write(first[:read])
				n, err = int64(written), cmp.Or(werr, err)
			}
		}
		a.header()
	}
	if err != nil && err != io.EOF {
		return n, err
	}
	rest, err := a.commonWriter.(io.ReaderFrom).ReadFrom(r)
	return n + rest, err
}

func (a *http1Answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, rw, err := a.commonWriter.(http.Hijacker).Hijack()
	return unkeyed(nc), rw, err
}

type http2Answer struct{ answer }

func (a *http2Answer) Push(target string, opts *http.PushOptions) error {
	return a.commonWriter.(http.Pusher).Push(target, opts)
}
