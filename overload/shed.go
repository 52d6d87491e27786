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

// A Shedder sheds clients that have waited in the accept queue for longer than its budget:
// its Handler answers them with 503, and its Listener closes their connections. [NewShedder]
// returns a Shedder. All methods may be called concurrently.
//
// The wait is that of [acceptq.QueueTime], which only Linux reports. On other systems a
// Shedder serves everybody, and [Shedder.Err] returns the reason.
//
// The time before the handshake is not in the wait. While the queue is full, the kernel
// drops the SYNs of new clients. First make the queue long enough, and watch Drops in
// [acceptq.Stats].
type Shedder struct {
	budget time.Duration
	shed   atomic.Uint64
	err    atomic.Pointer[error] // why waits cannot be read here
}

// NewShedder returns a Shedder with the given budget. With a budget of 0 or less it serves
// everybody.
func NewShedder(budget time.Duration) *Shedder { return &Shedder{budget: budget} }

// Shed returns the number of requests that the Handler has answered with 503, plus the
// number of connections that the Listener has closed.
func (s *Shedder) Shed() uint64 { return s.shed.Load() }

// Err returns nil if the Shedder can read waits, or if no connection has come yet. Otherwise
// it sheds nobody, and the error matches [errors.ErrUnsupported].
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

// ConnContext tells Handler whether c has waited for too long. It is a function for the field
// ConnContext of [http.Server]. To use several functions, chain them:
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
// waited for too long. It answers them with 503, "Retry-After: 1" and "Connection: close",
// so the next request of the client comes on a new connection with a wait of its own. Wrap
// only handlers that do work, so that /debug answers under overload too. The server also
// needs ConnContext.
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

// Listener returns a listener for the connections of ln. It closes connections that have
// waited for too long, and its Accept method returns the others. Put it below TLS, so that
// no TLS handshake is wasted on late connections. To drain, use ln itself.
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
