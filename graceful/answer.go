package graceful

import (
	"io"
	"net/http"
	"time"
)

// ServeHTTP is the Handler of the server while Serve runs.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, _ := r.Context().Value(s).(*conn)
	s.conns.begin(c, r.ProtoMajor == 1)
	defer s.conns.end(c)

	handler := s.user.handler
	if handler == nil {
		handler = http.DefaultServeMux
	}
	if !s.user.noOptions && r.RequestURI == "*" && r.Method == http.MethodOptions {
		handler = http.HandlerFunc(generalOptions)
	}
	turn := turnAway{w: w, s: s}
	switch w := w.(type) {
	case http1Writer:
		a := &http1Answer{http1Writer: w, turnAway: turn}
		handler.ServeHTTP(a, r)
		a.header()
	case http2Writer:
		a := &http2Answer{http2Writer: w, turnAway: turn}
		handler.ServeHTTP(a, r)
		a.header()
	default: // not a ResponseWriter of the current net/http
		turn.header()
		handler.ServeHTTP(w, r)
	}
}

// generalOptions answers OPTIONS with the target "*" as net/http does.
func generalOptions(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Length", "0")
	if r.ContentLength != 0 {
		io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 4<<10))
	}
}

// turnAway marks an answer so that net/http closes the connection after it. On HTTP/2 the
// same header makes net/http send a GOAWAY frame.
type turnAway struct {
	w    http.ResponseWriter
	s    *server
	done bool // the header has been sent and can no longer be changed
}

func (t *turnAway) header() {
	if t.done {
		return
	}
	t.done = true
	if t.s.stopping.Load() {
		t.w.Header().Set("Connection", "close")
	}
}

// status calls header, except for an informational answer, which precedes the header. An
// answer with status 101 needs its own "Connection: Upgrade".
func (t *turnAway) status(code int) {
	if code >= 200 {
		t.header()
	}
}

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

type http1Answer struct {
	http1Writer
	turnAway
}

func (a *http1Answer) Unwrap() http.ResponseWriter { return a.http1Writer }

func (a *http1Answer) WriteHeader(code int) {
	a.status(code)
	a.http1Writer.WriteHeader(code)
}

func (a *http1Answer) Write(p []byte) (int, error) {
	a.header()
	return a.http1Writer.Write(p)
}

func (a *http1Answer) WriteString(p string) (int, error) {
	a.header()
	return a.http1Writer.WriteString(p)
}

func (a *http1Answer) ReadFrom(r io.Reader) (int64, error) {
	a.header()
	return a.http1Writer.ReadFrom(r)
}

func (a *http1Answer) Flush() {
	a.header()
	a.http1Writer.Flush()
}

func (a *http1Answer) FlushError() error {
	a.header()
	return a.http1Writer.FlushError()
}

type http2Answer struct {
	http2Writer
	turnAway
}

func (a *http2Answer) Unwrap() http.ResponseWriter { return a.http2Writer }

func (a *http2Answer) WriteHeader(code int) {
	a.status(code)
	a.http2Writer.WriteHeader(code)
}

func (a *http2Answer) Write(p []byte) (int, error) {
	a.header()
	return a.http2Writer.Write(p)
}

func (a *http2Answer) WriteString(p string) (int, error) {
	a.header()
	return a.http2Writer.WriteString(p)
}

func (a *http2Answer) Flush() {
	a.header()
	a.http2Writer.Flush()
}

func (a *http2Answer) FlushError() error {
	a.header()
	return a.http2Writer.FlushError()
}
