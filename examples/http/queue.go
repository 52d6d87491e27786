package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
)

// bounds are the upper bounds of the buckets for queue times.
var bounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// queueTimes counts connections by how long they waited in the accept queue.
type queueTimes struct {
	buckets  [len(bounds) + 1]atomic.Int64 // the last bucket has no bound
	unknown  atomic.Int64                  // the system does not report the time, or not for this connection
	accepted atomic.Int64
	shed     atomic.Int64 // requests that were answered with 503
}

type queueTimeKey struct{}

// connContext records how long c waited. net/http calls it right after Accept.
func (q *queueTimes) connContext(ctx context.Context, c net.Conn) context.Context {
	q.accepted.Add(1)
	waited, err := acceptq.QueueTime(c)
	if err != nil {
		q.unknown.Add(1)
		return ctx
	}
	i := 0
	for i < len(bounds) && waited > bounds[i] {
		i++
	}
	q.buckets[i].Add(1)
	return context.WithValue(ctx, queueTimeKey{}, waited)
}

// shedding answers 503 at once to a client that has waited for longer than budget: that
// client has probably given up, so work for it would be wasted. Wrap only handlers that
// do work; /debug must answer when the server is overloaded. With a budget of 0 no client
// gets 503.
func (q *queueTimes) shedding(budget time.Duration, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		waited, known := r.Context().Value(queueTimeKey{}).(time.Duration)
		if !known || budget <= 0 || waited <= budget {
			h.ServeHTTP(w, r)
			return
		}
		q.shed.Add(1)
		w.Header().Set("Retry-After", "1")
		w.Header().Set("Connection", "close") // a new connection measures its own wait
		http.Error(w, "overloaded: try again later", http.StatusServiceUnavailable)
	})
}

type bucket struct {
	AtMost      string `json:"atMost"` // the last bucket is "more"
	Connections int64  `json:"connections"`
}

// MarshalJSON writes the distribution since the start.
func (q *queueTimes) MarshalJSON() ([]byte, error) {
	view := struct {
		Buckets []bucket `json:"buckets"`
		Unknown int64    `json:"unknown"`
		Shed    int64    `json:"shed"`
	}{Unknown: q.unknown.Load(), Shed: q.shed.Load()}
	for i := range q.buckets {
		name := "more"
		if i < len(bounds) {
			name = bounds[i].String()
		}
		view.Buckets = append(view.Buckets, bucket{name, q.buckets[i].Load()})
	}
	return json.Marshal(view)
}

// serveBacklog answers /debug/backlog. With ?waiting it lists the waiting clients; for
// that the kernel walks its table of connections.
func serveBacklog(ln *acceptq.Listener, times *queueTimes) http.HandlerFunc {
	type client struct {
		Client   string `json:"client"`
		Waited   string `json:"waited"`
		Received int64  `json:"received"`
		Closed   bool   `json:"closed"`
	}
	return func(w http.ResponseWriter, r *http.Request) {
		answer := struct {
			Backlog    acceptq.Backlog `json:"backlog"`
			QueueTimes *queueTimes     `json:"queueTimes"`
			Waiting    []client        `json:"waiting,omitzero"` // present if requested
			Error      string          `json:"error,omitempty"`
		}{Backlog: ln.Backlog(), QueueTimes: times}
		if r.URL.Query().Has("waiting") {
			waiting, err := ln.Waiting(r.Context())
			if err != nil {
				answer.Error = err.Error()
			} else {
				answer.Waiting = []client{}
			}
			for _, c := range waiting {
				answer.Waiting = append(answer.Waiting, client{c.Client.String(), c.Waited.String(), c.Received, c.Closed})
			}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(answer)
	}
}

// A watchdog detects that the server no longer calls Accept. A request to
// /debug/backlog would not help then: it would wait in the same queue.
type watchdog struct {
	accepted int64 // at the last look
	warned   bool  // whether it has logged since the last Accept
}

// look must be called once a second. If clients wait and the server has accepted none
// since the last look, it logs the client that has waited longest, once.
func (d *watchdog) look(ctx context.Context, accepted int64, s acceptq.Stats, waiting func(context.Context) ([]acceptq.Waiting, error)) {
	stuck := accepted == d.accepted && s.Queued > 0
	d.accepted = accepted
	if !stuck || d.warned {
		d.warned = stuck
		return
	}
	d.warned = true
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	switch clients, err := waiting(ctx); {
	case err != nil:
		slog.Error("Accept has not been called for a second", "queue", s, "error", err)
	case len(clients) == 0: // the kernel does not list a client that has reset its connection
		slog.Error("Accept has not been called for a second", "queue", s)
	case clients[0].Waited >= time.Second || clients[0].Waited < 0:
		slog.Error("Accept has not been called for a second", "queue", s, "first", clients[0].String())
	default: // the first client came after the last look
		d.warned = false
	}
}
