package overload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/acceptq/acceptq"
)

// Health returns a handler that answers 200 while the server accepts connections from the
// listeners. It answers 503 with one sentence if a client has waited for longer than limit
// and no client was accepted meanwhile, or if a listener is closed. For [acceptq.Shards]
// pass slices.Collect(shards.All()).
//
// It also answers 200 while a server is slow or overloaded but accepts. If the checks of an
// overloaded server fail, its clients move to the other servers, which get slower.
//
// The handler remembers what earlier checks have seen, beginning with its creation. On Linux
// the first check after the limit notices a server that has stopped. On other systems that
// report the queue the check after that does. On a system that does not report it, the
// answer is always 200.
func Health(limit time.Duration, listeners ...*acceptq.Listener) http.Handler {
	h := &health{limit: limit}
	for _, l := range listeners {
		h.states = append(h.states, &state{l: l, accepted: l.Accepted(), same: time.Now()})
	}
	return h
}

type health struct {
	limit  time.Duration
	mu     sync.Mutex
	states []*state
}

// A state is what the checks have seen of one listener.
type state struct {
	l        *acceptq.Listener
	accepted uint64
	same     time.Time // since when accepted has not changed
	waiting  time.Time // since when connections have waited while it has not; zero if none does
}

// ServeHTTP implements [http.Handler].
func (h *health) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if err := h.check(r.Context(), time.Now()); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (h *health) check(ctx context.Context, now time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var first error
	for _, s := range h.states { // all of them, so that each state is current
		if err := s.check(ctx, now, h.limit); err != nil && first == nil {
			first = fmt.Errorf("%v: %w", s.l, err)
		}
	}
	return first
}

func (s *state) check(ctx context.Context, now time.Time, limit time.Duration) error {
	stats, err := s.l.Stats()
	if errors.Is(err, net.ErrClosed) {
		return errors.New("the listener is closed")
	}
	// The counter is read after the queue. So a connection that was accepted in between
	// cannot count as one that waits.
	if n := s.l.Accepted(); n != s.accepted {
		s.accepted, s.same, s.waiting = n, now, time.Time{}
		return nil
	}
	if err != nil || stats.Queued <= 0 { // nothing is known, or nobody waits
		s.waiting = time.Time{}
		return nil
	}
	if s.waiting.IsZero() {
		s.waiting = now
	}
	if now.Sub(s.same) <= limit {
		return nil
	}
	waited := max(now.Sub(s.waiting), s.oldest(ctx))
	if waited <= limit {
		return nil
	}
	return fmt.Errorf("a client has waited for %v, and none was accepted meanwhile", waited.Round(time.Millisecond))
}

// oldest returns the longest wait that the kernel lists. It ignores a connection that may
// be in the queue of another process.
func (s *state) oldest(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	waiting, err := s.l.Waiting(ctx)
	if err != nil {
		return 0
	}
	for _, w := range waiting {
		if !w.Shared {
			return w.Waited
		}
	}
	return 0
}
