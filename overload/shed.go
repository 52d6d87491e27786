package overload

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
)

// A Shedder turns away clients that have waited in the accept queue for longer than its
// budget. It comes from [NewShedder]. All methods may be called concurrently.
//
// The wait is [acceptq.QueueTime], which only Linux reports. On other systems a Shedder
// serves everybody, and [Shedder.Err] says so.
type Shedder struct {
	budget time.Duration
	shed   atomic.Uint64
	err    atomic.Pointer[error] // why waits cannot be read here
}

// NewShedder returns a Shedder with the given budget. With a budget of 0 or less it serves
// everybody.
func NewShedder(budget time.Duration) *Shedder { return &Shedder{budget: budget} }

// Shed returns how many requests were answered with 503, and how many connections the
// Listener has closed.
func (s *Shedder) Shed() uint64 { return s.shed.Load() }

// Err returns nil if waits can be read, or if no connection has come yet. Otherwise nobody
// is turned away, and the error matches [errors.ErrUnsupported].
func (s *Shedder) Err() error {
	if err := s.err.Load(); err != nil {
		return *err
	}
	return nil
}

// late reports whether c has waited for longer than the budget.
func (s *Shedder) late(c net.Conn) bool {
	if s.budget <= 0 {
		return false
	}
	waited, err := acceptq.QueueTime(c)
	if errors.Is(err, errors.ErrUnsupported) && s.err.Load() == nil {
		s.err.Store(&err)
	}
	return err == nil && waited > s.budget
}

type lateKey struct{ *Shedder }

// ConnContext notes whether c has waited for too long, for Handler. It is meant for the
// field of that name in [http.Server]. Several functions for that field are chained like
// this:
//
//	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
//		return shed.ConnContext(queue.ConnContext(ctx, c), c)
//	}
func (s *Shedder) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if s.late(c) {
		return context.WithValue(ctx, lateKey{s}, true)
	}
	return ctx
}

// Handler returns a handler that calls h, except for requests of a connection that has
// waited for too long. It answers them with 503, Retry-After: 1 and Connection: close: the
// next connection of the client has its own wait. Wrap only handlers that do work, so that
// /debug answers under overload too. The server needs ConnContext.
func (s *Shedder) Handler(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Context().Value(lateKey{s}) == nil {
			h.ServeHTTP(w, r)
			return
		}
		s.shed.Add(1)
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		w.Header().Set("Connection", "close")
		http.Error(w, "overloaded: try again later", http.StatusServiceUnavailable)
	})
}

// retryAfter is in seconds, the unit of the header.
const retryAfter = 1

// Listener returns a listener for the connections of ln. It closes those that have waited
// for too long, and Accept returns the others. Put it below TLS, so that no handshake is
// wasted on them. To drain or close the server, use ln as without it.
func (s *Shedder) Listener(ln net.Listener) net.Listener { return &listener{ln, s} }

type listener struct {
	net.Listener
	shedder *Shedder
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || !l.shedder.late(c) {
			return c, err
		}
		l.shedder.shed.Add(1)
		c.Close()
	}
}
