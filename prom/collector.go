// Package acceptqprom reports accept queues to Prometheus.
//
// A [Collector] reads the accept queues of a program when it is scraped: how many
// connections wait, how many fit, how many were accepted, and how many packets were
// dropped. With a hook in the server it also reports how long each connection waited for
// Accept. The names of the metrics, alert rules and a dashboard are described in the README
// of this module.
//
// A [MachineCollector] reports the accept queues of all programs of a Linux machine, under
// the same names. The command acceptq-exporter serves it.
//
// A number that the system does not tell is absent. It is never -1 and never 0.
package acceptqprom

import (
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// unknown stands for a number that the system does not tell.
const unknown = -1

// A Collector is a [prometheus.Collector] of accept queues. It comes from [NewCollector].
// All methods may be called concurrently.
//
// A registry takes one Collector. To register two, give each of them a label with
// [prometheus.WrapRegistererWith].
type Collector struct {
	config   observe.Config
	perShard bool
	set      *observe.Set
	descs
	waits *prometheus.HistogramVec
}

// A Queue is a listener whose accept queue is reported. It comes from Add or AddShards. Its
// methods Observe, ConnContext and Listener record how long connections waited; see
// [observe.Queue].
type Queue = observe.Queue

// An Option changes what a Collector reports. A nil Option is ignored.
type Option func(*Collector)

// WithSampler reads each queue at an interval, in addition to the scrapes, and reports the
// largest length of the last window as tcp_accept_queue_length_peak. So the metrics show a
// burst that came and went between two scrapes. A scrape does not reset the peak, so any
// number of Prometheus servers see it. Make the window at least as long as the
// longest scrape interval. The alert rules assume that it is not longer than five minutes.
//
// WithSampler(10*time.Millisecond, time.Minute) suits most servers. The sampler runs in one
// goroutine while the Collector has a listener. If interval or window is 0 or less, there is
// none.
func WithSampler(interval, window time.Duration) Option {
	if window <= 0 {
		interval = 0
	}
	return func(c *Collector) { c.config.Interval, c.config.Window = interval, window }
}

// WithShardLabel reports the shards of [acceptq.Shards] one by one, with the label shard,
// instead of their sums. The waits and the handshakes are always reported for all shards
// together.
func WithShardLabel() Option {
	return func(c *Collector) { c.perShard = true }
}

// WithOldestWait reports how long the oldest waiting connection has waited as
// tcp_accept_queue_oldest_wait_seconds. A scrape asks the kernel if a connection waits, and
// at most once in the given time; 5 s suits most servers. [acceptq.Listener.Waiting] says
// what that costs. With 0 or less it does not ask. Linux only.
func WithOldestWait(every time.Duration) Option {
	return func(c *Collector) { c.config.OldestWait = every }
}

// WithHandshakes reports the in-flight handshakes as tcp_accept_queue_handshakes. A scrape
// asks the kernel at most once in the given time; 5 s suits most servers.
// [acceptq.Listener.Handshakes] says what is counted and what that costs. With 0 or less it
// does not ask. Linux only.
func WithHandshakes(every time.Duration) Option {
	return func(c *Collector) { c.config.Handshakes = every }
}

// NewCollector returns a Collector without listeners. Register it, and call Add for each
// listener. Call Close if the program goes on without it.
func NewCollector(opts ...Option) *Collector {
	c := new(Collector)
	for _, o := range opts {
		if o != nil {
			o(c)
		}
	}
	c.config.Export = c.export
	c.set = observe.NewSet(c.config)
	labels := []string{"listener"}
	if c.perShard {
		labels = append(labels, "shard")
	}
	c.descs = newDescs(c.set.Window(), labels, labels[:1])
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

// Add reports the accept queue of the listener l under a name, which becomes the label
// listener of its metrics. l is an [*acceptq.Listener] or any other listening TCP socket,
// such as a [*net.TCPListener]. See [observe.Set.Add] for the errors.
//
// When l is closed it disappears from the metrics, and the name can be used again. On
// systems where the queue cannot be read Add succeeds, and the metrics are absent.
func (c *Collector) Add(name string, l syscall.Conn) (*Queue, error) { return c.set.Add(name, l) }

// AddShards is Add for [acceptq.Shards]. The metrics are the sums of all shards, and how
// full the fullest shard is. With [WithShardLabel] each shard has metrics of its own.
func (c *Collector) AddShards(name string, shards *acceptq.Shards) (*Queue, error) {
	return c.set.AddShards(name, shards)
}

// Close removes all listeners and ends the sampler. The listeners stay open. Afterwards Add
// returns an error. A scrape still gets the numbers of the system; call
// [prometheus.Registerer].Unregister to end that.
func (c *Collector) Close() error { return c.set.Close() }

// descs has one description for each metric but the wait.
type descs struct {
	length, peak, capacity, limit, requested, heldBack, accepted, drops *prometheus.Desc
	oldest, handshakes, unknownWaits, shards, fullest, fullestMax       *prometheus.Desc
	ceiling, overflows, lost, synDrops, synCookies                      *prometheus.Desc
}

// newDescs returns the descriptions. A queue has the labels queue; what is known of all shards
// together has the labels listener.
func newDescs(window time.Duration, queue, listener []string) descs {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return descs{
		length:       desc("tcp_accept_queue_length", "Connections that wait in the accept queue of this listener now.", queue...),
		peak:         desc("tcp_accept_queue_length_peak", "Largest length of the accept queue that the sampler saw in the last "+window.String()+".", queue...),
		capacity:     desc("tcp_accept_queue_capacity", "Connections that fit in the accept queue.", queue...),
		limit:        desc("tcp_accept_queue_limit", "Backlog that the kernel granted to this listener.", queue...),
		requested:    desc("tcp_accept_queue_requested", "Backlog that the program asked for; absent if it asked for the maximum or if that is unknown.", queue...),
		heldBack:     desc("tcp_accept_queue_held_back", "Connections that an accept filter holds back from the accept queue.", queue...),
		accepted:     desc("tcp_accept_queue_accepted_total", "Connections that Accept has returned.", queue...),
		drops:        desc("tcp_accept_queue_drops_total", "Packets that this listener dropped for any reason, also those of port scans and health checks, which harm nobody.", queue...),
		oldest:       desc("tcp_accept_queue_oldest_wait_seconds", "Time that the oldest waiting connection has waited in the accept queue.", listener...),
		handshakes:   desc("tcp_accept_queue_handshakes", "Handshakes in flight on the address of this listener.", listener...),
		unknownWaits: desc("tcp_accept_queue_wait_unknown_total", "Connections whose time in the accept queue could not be read.", listener...),
		shards:       desc("tcp_accept_queue_shards", "Queues of this listener whose numbers are added up; absent if it is one.", listener...),
		fullest:      desc("tcp_accept_queue_fullest_ratio", "Part of its capacity that the fullest of the shards has in use; absent if there is one queue.", listener...),
		fullestMax:   desc("tcp_accept_queue_fullest_peak_ratio", "Largest part of its capacity that a shard had in use in the last "+window.String()+"; absent if there is one queue.", listener...),
		ceiling:      desc("tcp_accept_queue_ceiling", "Largest backlog that the system grants now (Linux: net.core.somaxconn)."),
		overflows:    desc("tcp_listen_overflows_total", "Packets that met a full accept queue, for all listeners of the network namespace (ListenOverflows)."),
		lost:         desc("tcp_listen_drops_total", "Overflows, and SYNs dropped for another reason, for all listeners of the network namespace (ListenDrops)."),
		synDrops:     desc("tcp_syn_queue_drops_total", "SYNs dropped because the SYN queue was full, for all listeners of the network namespace (TCPReqQFullDrop)."),
		synCookies:   desc("tcp_syn_queue_cookies_total", "SYNs answered with a cookie because the SYN queue was full, for all listeners of the network namespace (TCPReqQFullDoCookies)."),
	}
}

// waits is whether a wait can be read here. The histogram is reported before the first
// connection is observed, because Prometheus sees no increase in the first sample of a series.
const waits = runtime.GOOS == "linux"

// An exporter is what a Queue needs for Prometheus.
type exporter struct {
	labels [][]*dto.LabelPair // of each socket, or of their sum
	all    []*dto.LabelPair   // of the listener
	wait   prometheus.Histogram
	remove func()
}

func (e *exporter) Observe(wait time.Duration) { e.wait.Observe(wait.Seconds()) }
func (e *exporter) Remove()                    { e.remove() }

func (c *Collector) export(q *Queue) observe.Exporter {
	name := q.Name()
	e := &exporter{
		all:    prometheus.MakeLabelPairs(c.oldest, []string{name}),
		wait:   c.waits.WithLabelValues(name).(prometheus.Histogram),
		remove: func() { c.waits.DeleteLabelValues(name) },
	}
	if !c.perShard {
		e.labels = append(e.labels, e.all)
		return e
	}
	for i := range q.Len() {
		shard := ""
		if q.Len() > 1 {
			shard = strconv.Itoa(i)
		}
		e.labels = append(e.labels, prometheus.MakeLabelPairs(c.length, []string{name, shard}))
	}
	return e
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.length, c.peak, c.capacity, c.limit, c.requested, c.heldBack, c.accepted, c.drops,
		c.oldest, c.handshakes, c.unknownWaits, c.shards, c.fullest, c.fullestMax,
		c.ceiling, c.overflows, c.lost, c.synDrops, c.synCookies,
	} {
		ch <- d
	}
	c.waits.Describe(ch)
}

// Collect implements [prometheus.Collector]. It reads each queue from the kernel, and the
// settings and counters of the calling thread's network namespace.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	c.system(ch)
	var r observe.Reading
	for _, q := range c.set.Queues() {
		if q.Read(&r) != nil {
			continue
		}
		e := q.Exporter().(*exporter)
		m := make(samples, 0, 8*len(e.labels)+6)
		if c.perShard {
			for i := range r.Shards {
				c.numbers(ch, &m, e.labels[i], &r.Shards[i])
			}
		} else {
			c.numbers(ch, &m, e.all, &r.Numbers)
			if n := len(r.Shards); n > 1 {
				m.send(ch, c.shards, gauge, e.all, float64(n))
				if part, known := r.Stats.Utilization(); known && r.Stats.Fullest != nil {
					m.send(ch, c.fullest, gauge, e.all, part)
				}
				if c.config.Interval > 0 {
					m.send(ch, c.fullestMax, gauge, e.all, r.FullestPeak)
				}
			}
		}
		if r.OldestWait != unknown {
			m.send(ch, c.oldest, gauge, e.all, r.OldestWait.Seconds())
		}
		m.send(ch, c.handshakes, gauge, e.all, float64(r.Handshakes))
		m.send(ch, c.unknownWaits, counter, e.all, float64(r.UnknownWaits))
		if waits {
			ch <- e.wait
		}
	}
}

// system reports the settings and counters of the calling thread's network namespace.
func (d *descs) system(ch chan<- prometheus.Metric) {
	s, err := acceptq.ReadSystem()
	if err == nil {
		m := make(samples, 0, 5)
		m.send(ch, d.ceiling, gauge, nil, float64(s.Ceiling))
		m.send(ch, d.overflows, counter, nil, float64(s.ListenOverflows))
		m.send(ch, d.lost, counter, nil, float64(s.ListenDrops))
		m.send(ch, d.synDrops, counter, nil, float64(s.ReqQFullDrop))
		m.send(ch, d.synCookies, counter, nil, float64(s.ReqQFullDoCookies))
	}
}

func (c *Collector) numbers(ch chan<- prometheus.Metric, m *samples, labels []*dto.LabelPair, n *observe.Numbers) {
	m.send(ch, c.length, gauge, labels, float64(n.Stats.Queued))
	if c.config.Interval > 0 {
		m.send(ch, c.peak, gauge, labels, float64(n.Peak))
	}
	m.send(ch, c.capacity, gauge, labels, float64(n.Stats.Capacity))
	m.send(ch, c.limit, gauge, labels, float64(n.Stats.Limit))
	m.send(ch, c.requested, gauge, labels, float64(n.Requested))
	m.send(ch, c.heldBack, gauge, labels, float64(n.Stats.Incomplete))
	m.send(ch, c.accepted, counter, labels, float64(n.Accepted))
	m.send(ch, c.drops, counter, labels, float64(n.Stats.Drops))
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
func (s *samples) send(ch chan<- prometheus.Metric, desc *prometheus.Desc, k kind, labels []*dto.LabelPair, value float64) {
	if value == unknown {
		return
	}
	*s = append(*s, sample{desc, k, labels, value})
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
