// Package acceptqotel reports accept queues to OpenTelemetry.
//
// [Instruments] read the accept queues of a program when its metrics are collected: how
// many connections wait, how many fit, and how many packets were dropped. With a hook in
// the server they also report how long each connection waited for Accept. The names of the
// metrics are in the README of this module.
//
// A number that the system does not tell is absent. It is never -1 and never 0.
package acceptqotel

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/acceptq/acceptq"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// scope is the name of the instrumentation scope.
const scope = "github.com/acceptq/acceptq/otel"

// Instruments are the metrics of accept queues. They come from [New]. All methods may be
// called concurrently.
type Instruments struct {
	*set
	registration metric.Registration
	wait         metric.Float64Histogram

	length, peak, capacity, limit, requested, heldBack metric.Int64ObservableUpDownCounter
	ceiling                                            metric.Int64ObservableGauge
	drops, overflows, lost                             metric.Int64ObservableCounter
}

// An Option changes what Instruments report.
type Option func(*Instruments)

// WithSampler reads each queue at an interval, in addition to the collections, and reports
// the largest length that was seen during the last window as tcp.accept_queue.length.peak.
// So a burst shows that came and went between two collections. The peak does not change
// when it is read, so that any number of readers see it. Make the window at least as long
// as the longest interval of a reader.
//
// An interval of 0 or less is 10 ms, a window of 0 or less is one minute. The sampler runs
// in one goroutine while there is a listener.
func WithSampler(interval, window time.Duration) Option {
	return func(i *Instruments) { i.set.sampling(interval, window) }
}

// WithShardLabel reports the shards of [acceptq.Shards] one by one, with the attribute
// shard, instead of their sums. The wait is always reported for all shards together.
func WithShardLabel() Option {
	return func(i *Instruments) { i.set.perShard = true }
}

// New makes the instruments with a meter of the provider. Call Add for each listener. The
// error is that of the provider.
func New(provider metric.MeterProvider, opts ...Option) (*Instruments, error) {
	if provider == nil {
		return nil, errors.New("acceptqotel: nil MeterProvider")
	}
	i := new(Instruments)
	i.set = newSet(i.equip)
	for _, o := range opts {
		o(i)
	}

	meter := provider.Meter(scope)
	var errs []error
	upDown := func(name, help string) metric.Int64ObservableUpDownCounter {
		m, err := meter.Int64ObservableUpDownCounter(name, metric.WithUnit("{connection}"), metric.WithDescription(help))
		errs = append(errs, err)
		return m
	}
	counter := func(name, help string) metric.Int64ObservableCounter {
		m, err := meter.Int64ObservableCounter(name, metric.WithUnit("{packet}"), metric.WithDescription(help))
		errs = append(errs, err)
		return m
	}
	i.length = upDown("tcp.accept_queue.length", "Connections that wait in the accept queue of this listener now.")
	i.capacity = upDown("tcp.accept_queue.capacity", "Connections that fit in the accept queue before the next client is turned away.")
	i.limit = upDown("tcp.accept_queue.limit", "Backlog that the kernel granted to this listener.")
	i.requested = upDown("tcp.accept_queue.requested", "Backlog that the program asked for; absent if it asked for the maximum or if that is unknown.")
	i.heldBack = upDown("tcp.accept_queue.held_back", "Connections that an accept filter holds back from the accept queue.")
	i.drops = counter("tcp.accept_queue.drops", "Packets that this listener dropped instead of taking a step towards a connection, retries included.")
	i.overflows = counter("tcp.listen.overflows", "Packets that met a full accept queue, for all listeners of the network namespace (ListenOverflows).")
	i.lost = counter("tcp.listen.drops", "Packets to listening sockets that were dropped for any reason, for all listeners of the network namespace (ListenDrops).")
	var err error
	i.ceiling, err = meter.Int64ObservableGauge("tcp.accept_queue.ceiling", metric.WithUnit("{connection}"),
		metric.WithDescription("Largest backlog that the system grants now (Linux: net.core.somaxconn)."))
	errs = append(errs, err)
	i.wait, err = meter.Float64Histogram("tcp.accept_queue.wait", metric.WithUnit("s"),
		metric.WithDescription("Time that a connection waited in the accept queue until the program accepted it."),
		metric.WithExplicitBucketBoundaries(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30))
	errs = append(errs, err)
	observed := []metric.Observable{
		i.length, i.capacity, i.limit, i.requested, i.heldBack, i.drops, i.overflows, i.lost, i.ceiling,
	}
	if i.interval > 0 {
		i.peak = upDown("tcp.accept_queue.length.peak", "Largest length of the accept queue that the sampler saw in the last "+i.window.String()+".")
		observed = append(observed, i.peak)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	i.registration, err = meter.RegisterCallback(i.collect, observed...)
	if err != nil {
		return nil, err
	}
	return i, nil
}

// Close removes all listeners and ends the report. The listeners stay open.
func (i *Instruments) Close() error {
	for _, q := range i.all() {
		q.Remove()
	}
	return i.registration.Unregister()
}

// own is what a Queue needs for OpenTelemetry.
type own struct {
	labels  []metric.MeasurementOption // of each socket, or of their sum
	wait    func(time.Duration)
	release func()
}

func (i *Instruments) equip(q *Queue) own {
	listener := attribute.String("listener", q.name)
	all := metric.WithAttributeSet(attribute.NewSet(listener))
	o := own{
		wait:    func(d time.Duration) { i.wait.Record(context.Background(), d.Seconds(), all) },
		release: func() {},
	}
	if !i.perShard || len(q.sockets) == 1 {
		o.labels = []metric.MeasurementOption{all}
		return o
	}
	for n := range q.sockets {
		o.labels = append(o.labels, metric.WithAttributeSet(attribute.NewSet(listener, attribute.String("shard", strconv.Itoa(n)))))
	}
	return o
}

func (q *Queue) observe(wait time.Duration) { q.own.wait(wait) }

// collect is called once in each collection.
func (i *Instruments) collect(_ context.Context, o metric.Observer) error {
	report := func(m metric.Int64Observable, value int64, labels ...metric.ObserveOption) {
		if value != unknown {
			o.ObserveInt64(m, value, labels...)
		}
	}
	if s, err := acceptq.ReadSystem(); err == nil {
		report(i.ceiling, int64(s.Ceiling))
		report(i.overflows, s.ListenOverflows)
		report(i.lost, s.ListenDrops)
	}
	var buf []reading
	for _, q := range i.all() {
		each, sum, open := q.read(buf[:0])
		buf = each
		if !open {
			i.remove(q)
			continue
		}
		queue := func(r reading, requested int, labels metric.ObserveOption) {
			report(i.length, int64(r.Queued), labels)
			if i.interval > 0 {
				report(i.peak, int64(r.peak), labels)
			}
			report(i.capacity, int64(r.Capacity), labels)
			report(i.limit, int64(r.Limit), labels)
			report(i.requested, int64(requested), labels)
			report(i.heldBack, int64(r.Incomplete), labels)
			report(i.drops, r.Drops, labels)
		}
		if !i.perShard {
			queue(sum, q.requested(), q.own.labels[0])
			continue
		}
		for n, r := range each {
			queue(r, q.sockets[n].requested(), q.own.labels[n])
		}
	}
	return nil
}
