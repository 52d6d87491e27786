package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/overload"
)

// bounds are the upper bounds of the buckets for queue times.
var bounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// queueTimes counts connections by how long they waited in the accept queue. It is an
// [observe.Exporter].
type queueTimes struct {
	buckets [len(bounds) + 1]atomic.Int64 // the last bucket has no bound
}

// Observe counts one connection. A connection whose wait the system does not report is not
// counted.
func (q *queueTimes) Observe(waited time.Duration) {
	i := 0
	for i < len(bounds) && waited > bounds[i] {
		i++
	}
	q.buckets[i].Add(1)
}

// Remove does nothing: the distribution is kept.
func (*queueTimes) Remove() {}

type bucket struct {
	AtMost      string `json:"atMost"` // the last bucket is "more"
	Connections int64  `json:"connections"`
}

// MarshalJSON writes the distribution since the start.
func (q *queueTimes) MarshalJSON() ([]byte, error) {
	var all []bucket
	for i := range q.buckets {
		name := "more"
		if i < len(bounds) {
			name = bounds[i].String()
		}
		all = append(all, bucket{name, q.buckets[i].Load()})
	}
	return json.Marshal(all)
}

// serveBacklog answers /debug/backlog. With ?waiting it lists the waiting clients; for
// that the kernel walks its table of connections.
func serveBacklog(ln *acceptq.Listener, times *queueTimes, shed *overload.Shedder) http.HandlerFunc {
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
			Shed       uint64          `json:"shed"`             // requests that were answered with 503
			Waiting    []client        `json:"waiting,omitzero"` // present if requested
			Error      string          `json:"error,omitempty"`
		}{Backlog: ln.Backlog(), QueueTimes: times, Shed: shed.Shed()}
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

// A watchdog detects that the server no longer calls Accept, and logs who waits.
type watchdog struct {
	accepted uint64 // at the last look
	warned   bool   // whether it has logged since the last Accept
}

// look must be called once a second. If clients wait and the server has accepted none
// since the last look, it logs the client that has waited longest, once.
func (d *watchdog) look(ctx context.Context, accepted uint64, s acceptq.Stats, waiting func(context.Context) ([]acceptq.Waiting, error)) {
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
