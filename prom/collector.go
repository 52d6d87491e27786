// Package acceptqprom reports accept queues to Prometheus.
//
// A [Collector] reads the accept queues of a program when it is scraped: how many
// connections wait, how many fit, and how many packets were dropped. With a hook in the
// server it also reports how long each connection waited for Accept. The names of the
// metrics, alert rules and a dashboard are described in the README of this module.
//
// A number that the system does not tell is absent. It is never -1 and never 0.
package acceptqprom

import (
	"runtime"
	"strconv"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// A Collector is a [prometheus.Collector] of accept queues. It comes from [NewCollector].
// All methods may be called concurrently.
//
// A registry takes one Collector. To register two, give each of them a label with
// [prometheus.WrapRegistererWith].
type Collector struct {
	*set
	descs
	waits *prometheus.HistogramVec
}

// An Option changes what a Collector reports.
type Option func(*Collector)

// WithSampler reads each queue at an interval, in addition to the scrapes, and reports the
// largest length that was seen during the last window as tcp_accept_queue_length_peak. So a
// burst shows that came and went between two scrapes. The peak does not change when it is
// read, so that any number of scrapers see it. Make the window at least as long as the
// longest scrape interval.
//
// An interval of 0 or less is 10 ms, a window of 0 or less is one minute. The sampler runs
// in one goroutine while the Collector has a listener.
func WithSampler(interval, window time.Duration) Option {
	return func(c *Collector) { c.set.sampling(interval, window) }
}

// WithShardLabel reports the shards of [acceptq.Shards] one by one, with the label shard,
// instead of their sums. The wait is always reported for all shards together.
func WithShardLabel() Option {
	return func(c *Collector) { c.set.perShard = true }
}

// NewCollector returns a Collector without listeners. Register it, and call Add for each
// listener.
func NewCollector(opts ...Option) *Collector {
	c := new(Collector)
	c.set = newSet(c.equip)
	for _, o := range opts {
		o(c)
	}
	labels := []string{"listener"}
	if c.perShard {
		labels = append(labels, "shard")
	}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	c.descs = descs{
		length:    desc("tcp_accept_queue_length", "Connections that wait in the accept queue of this listener now.", labels...),
		peak:      desc("tcp_accept_queue_length_peak", "Largest length of the accept queue that the sampler saw in the last "+c.window.String()+".", labels...),
		capacity:  desc("tcp_accept_queue_capacity", "Connections that fit in the accept queue before the next client is turned away.", labels...),
		limit:     desc("tcp_accept_queue_limit", "Backlog that the kernel granted to this listener.", labels...),
		requested: desc("tcp_accept_queue_requested", "Backlog that the program asked for; absent if it asked for the maximum or if that is unknown.", labels...),
		heldBack:  desc("tcp_accept_queue_held_back", "Connections that an accept filter holds back from the accept queue.", labels...),
		drops:     desc("tcp_accept_queue_drops_total", "Packets that this listener dropped instead of taking a step towards a connection, retries included.", labels...),
		ceiling:   desc("tcp_accept_queue_ceiling", "Largest backlog that the system grants now (Linux: net.core.somaxconn)."),
		overflows: desc("tcp_listen_overflows_total", "Packets that met a full accept queue, for all listeners of the network namespace (ListenOverflows)."),
		lost:      desc("tcp_listen_drops_total", "Packets to listening sockets that were dropped for any reason, for all listeners of the network namespace (ListenDrops)."),
	}
	c.waits = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:                            "tcp_accept_queue_wait_seconds",
		Help:                            "Time that a connection waited in the accept queue until the program accepted it.",
		Buckets:                         []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		NativeHistogramBucketFactor:     1.1,
		NativeHistogramMaxBucketNumber:  100,
		NativeHistogramMinResetDuration: time.Hour,
	}, []string{"listener"})
	return c
}

// descs has one description for each metric but the wait.
type descs struct {
	length, peak, capacity, limit, requested, heldBack, drops *prometheus.Desc
	ceiling, overflows, lost                                  *prometheus.Desc
}

// waits is whether a wait can be read here. The histogram is reported before the first
// connection is observed, because Prometheus sees no increase in the first sample of a series.
const waits = runtime.GOOS == "linux"

// own is what a Queue needs for Prometheus.
type own struct {
	labels  [][]*dto.LabelPair // of each socket, or of their sum
	wait    prometheus.Histogram
	release func()
}

func (c *Collector) equip(q *Queue) own {
	values := []string{q.name}
	o := own{
		wait:    c.waits.WithLabelValues(q.name).(prometheus.Histogram),
		release: func() { c.waits.DeleteLabelValues(q.name) },
	}
	if !c.perShard {
		o.labels = append(o.labels, prometheus.MakeLabelPairs(c.length, values))
		return o
	}
	for i := range q.sockets {
		shard := ""
		if len(q.sockets) > 1 {
			shard = strconv.Itoa(i)
		}
		o.labels = append(o.labels, prometheus.MakeLabelPairs(c.length, []string{q.name, shard}))
	}
	return o
}

func (q *Queue) observe(wait time.Duration) {
	q.own.wait.Observe(wait.Seconds())
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.length, c.peak, c.capacity, c.limit, c.requested, c.heldBack, c.drops,
		c.ceiling, c.overflows, c.lost,
	} {
		ch <- d
	}
	c.waits.Describe(ch)
}

// Collect implements [prometheus.Collector]. It reads each queue from the kernel, and the
// settings and counters of the calling thread's network namespace.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	s, err := acceptq.ReadSystem()
	if err == nil {
		m := make(samples, 0, 3)
		m.send(ch, c.ceiling, gauge, nil, int64(s.Ceiling))
		m.send(ch, c.overflows, counter, nil, s.ListenOverflows)
		m.send(ch, c.lost, counter, nil, s.ListenDrops)
	}
	var buf []reading
	for _, q := range c.all() {
		each, sum, open := q.read(buf[:0])
		buf = each
		if !open {
			c.remove(q)
			continue
		}
		m := make(samples, 0, 7*len(q.own.labels))
		if c.perShard {
			for i, r := range each {
				c.queue(ch, &m, q.own.labels[i], r, q.sockets[i].requested())
			}
		} else {
			c.queue(ch, &m, q.own.labels[0], sum, q.requested())
		}
		if waits {
			ch <- q.own.wait
		}
	}
}

func (c *Collector) queue(ch chan<- prometheus.Metric, m *samples, labels []*dto.LabelPair, r reading, requested int) {
	m.send(ch, c.length, gauge, labels, int64(r.Queued))
	if c.interval > 0 {
		m.send(ch, c.peak, gauge, labels, int64(r.peak))
	}
	m.send(ch, c.capacity, gauge, labels, int64(r.Capacity))
	m.send(ch, c.limit, gauge, labels, int64(r.Limit))
	m.send(ch, c.requested, gauge, labels, int64(requested))
	m.send(ch, c.heldBack, gauge, labels, int64(r.Incomplete))
	m.send(ch, c.drops, counter, labels, r.Drops)
}

// A sample is a [prometheus.Metric] whose labels were made when its listener was added.
// [prometheus.NewConstMetric] makes and checks them at every scrape.
type sample struct {
	desc   *prometheus.Desc
	kind   kind
	labels []*dto.LabelPair
	value  float64
}

type kind int

const (
	gauge kind = iota
	counter
)

// samples is the room for the samples of one Queue, made at once.
type samples []sample

// send sends a sample, unless its value is unknown.
func (s *samples) send(ch chan<- prometheus.Metric, desc *prometheus.Desc, k kind, labels []*dto.LabelPair, value int64) {
	if value == unknown {
		return
	}
	*s = append(*s, sample{desc, k, labels, float64(value)})
	ch <- &(*s)[len(*s)-1]
}

// Desc implements [prometheus.Metric].
func (s *sample) Desc() *prometheus.Desc { return s.desc }

// Write implements [prometheus.Metric].
func (s *sample) Write(out *dto.Metric) error {
	out.Label = s.labels[:len(s.labels):len(s.labels)] // whoever appends a label makes a copy
	switch s.kind {
	case gauge:
		out.Gauge = &dto.Gauge{Value: &s.value}
	case counter:
		out.Counter = &dto.Counter{Value: &s.value}
	}
	return nil
}
