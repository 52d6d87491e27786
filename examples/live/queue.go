package main

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/arl/statsviz"
)

// A queue has what the page shows of the time since its last update.
type queue struct {
	mu    sync.Mutex
	peak  int             // largest length
	waits []time.Duration // of the connections that were accepted

	now   acceptq.Stats // at the last update
	drops int64         // until the update before
	shown []time.Duration
}

// sample reads the queue every 10 ms until ctx ends, so that a burst between two updates
// shows.
func (q *queue) sample(ctx context.Context, ln *acceptq.Listener) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s, err := ln.Stats(); err == nil {
			q.mu.Lock()
			q.peak = max(q.peak, s.Queued)
			q.mu.Unlock()
		}
	}
}

// observe is for http.Server.ConnContext.
func (q *queue) observe(ctx context.Context, c net.Conn) context.Context {
	if wait, err := acceptq.QueueTime(c); err == nil {
		q.mu.Lock()
		q.waits = append(q.waits, wait)
		q.mu.Unlock()
	}
	return ctx
}

// plots returns the plots of ln. What the system does not tell has no plot.
func (q *queue) plots(ln *acceptq.Listener) (options []statsviz.Option, err error) {
	first, err := ln.Stats()
	if err != nil {
		return nil, err
	}
	q.now, q.drops = first, first.Drops

	add := func(name, title, unit, info string, kind statsviz.TimeSeriesType, series ...statsviz.TimeSeries) {
		plot, e := statsviz.TimeSeriesPlotConfig{
			Name: name, Title: title, Type: kind, YAxisTitle: unit, InfoText: info, Series: series,
		}.Build()
		if e != nil {
			err = e
			return
		}
		options = append(options, statsviz.TimeseriesPlot(plot))
	}
	series := func(name, format string, value func() float64) statsviz.TimeSeries {
		return statsviz.TimeSeries{Name: name, Unitfmt: format, GetValue: func() float64 {
			q.mu.Lock()
			defer q.mu.Unlock()
			return value()
		}}
	}

	// The page asks for the series in this order, once for each update.
	add("accept-queue", "Accept queue", "connections",
		"Connections that wait for Accept, the largest number since the last update, and how many fit. At the capacity the queue is full, and the kernel drops or resets new clients.",
		statsviz.Scatter,
		series("waiting", "d", func() float64 {
			if s, err := ln.Stats(); err == nil {
				q.now = s
			}
			return float64(q.now.Queued)
		}),
		series("peak", "d", func() float64 {
			peak := max(q.peak, q.now.Queued)
			q.peak = 0
			return float64(peak)
		}),
		series("capacity", "d", func() float64 { return float64(q.now.Capacity) }),
	)
	if first.Drops >= 0 {
		add("accept-drops", "Accept queue: drops", "packets",
			"Packets that the listener dropped since the last update. While the queue is full they are those of clients, who try again after a second. At other times they harm nobody: port scans and health checks.",
			statsviz.Bar,
			series("drops", "d", func() float64 {
				d := uint32(q.now.Drops) - uint32(q.drops) // the kernel's counter has 32 bits
				q.drops = q.now.Drops
				return float64(d)
			}))
	}
	add("accept-wait", "Accept queue: wait", "seconds",
		"How long the connections that were accepted since the last update had waited in the queue.",
		statsviz.Scatter,
		series("median", ".3f", func() float64 {
			slices.Sort(q.waits)
			q.shown, q.waits = q.waits, q.shown[:0]
			return median(q.shown).Seconds()
		}),
		series("longest", ".3f", func() float64 {
			if len(q.shown) == 0 {
				return 0
			}
			return q.shown[len(q.shown)-1].Seconds()
		}))
	return options, err
}
