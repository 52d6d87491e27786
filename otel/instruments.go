// Package acceptqotel reports accept queues to OpenTelemetry.
//
// [Instruments] read the accept queues of a program when its metrics are collected: how
// many connections wait, how many fit, how many were accepted, and how many packets were
// dropped. With a hook in the server they also report how long each connection waited for
// Accept. The names of the
// metrics are in the README of this module.
//
// A number that the system does not tell is absent. It is never -1 and never 0.
package acceptqotel

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// scope is the name of the instrumentation scope.
const scope = "github.com/acceptq/acceptq/otel"

// unknown stands for a number that the system does not tell.
const unknown = -1

// maxNames is how many different names Instruments take. OpenTelemetry never forgets the
// histogram of a name, and its SDK merges the series above its limit, 2,000 by default.
const maxNames = 1900

// providers has the Instruments of each MeterProvider, until Close.
var providers struct {
	mu   sync.Mutex
	used map[metric.MeterProvider]bool
}

// Instruments are the metrics of accept queues. They come from [New]. All methods may be
// called concurrently.
type Instruments struct {
	config       observe.Config
	perShard     bool
	set          *observe.Set
	provider     metric.MeterProvider // nil if it was not noted in providers
	registration metric.Registration
	wait         metric.Float64Histogram

	mu    sync.Mutex
	names map[string]bool // that have ever been used

	length, peak, capacity, limit, requested, heldBack, shards, handshakes metric.Int64ObservableUpDownCounter
	ceiling                                                                metric.Int64ObservableGauge
	accepted, unknownWaits, drops, overflows, lost, synDrops, synCookies   metric.Int64ObservableCounter
	oldest, fullest, fullestPeak                                           metric.Float64ObservableGauge
}

// A Queue is a listener whose accept queue is reported. It comes from Add or AddShards. Its
// methods Observe, ConnContext and Listener record how long connections waited; see
// [observe.Queue].
type Queue = observe.Queue

// An Option changes what Instruments report. A nil Option is ignored.
type Option func(*Instruments)

// WithSampler reads each queue at an interval, in addition to the collections, and reports
// the largest length that was seen during the last window as tcp.accept_queue.length.peak.
// So a burst shows that came and went between two collections. The peak does not change
// when it is read, so that any number of readers see it. Make the window at least as long
// as the longest interval of a reader, and at most five minutes for the alert rules.
//
// WithSampler(10*time.Millisecond, time.Minute) suits most servers. The sampler runs in one
// goroutine while there is a listener. If interval or window is 0 or less, there is none.
func WithSampler(interval, window time.Duration) Option {
	if window <= 0 {
		interval = 0
	}
	return func(i *Instruments) { i.config.Interval, i.config.Window = interval, window }
}

// WithShardLabel reports the shards of [acceptq.Shards] one by one, with the attribute
// shard, instead of their sums. The waits and the handshakes are always reported for all
// shards together.
func WithShardLabel() Option {
	return func(i *Instruments) { i.perShard = true }
}

// WithOldestWait reports how long the oldest waiting connection has waited as
// tcp.accept_queue.oldest_wait. The kernel is asked in a collection, only if a connection
// waits, and at most once in the given time; see [acceptq.Listener.Waiting] for what that
// costs: 5 s suits most servers. With 0 or less the kernel is not asked. Linux only.
func WithOldestWait(every time.Duration) Option {
	return func(i *Instruments) { i.config.OldestWait = every }
}

// WithHandshakes reports the in-flight handshakes as tcp.accept_queue.handshakes. The
// kernel is asked in a collection, at most once in the given time; see
// [acceptq.Listener.Handshakes] for what is counted and what that costs: 5 s suits most
// servers. With 0 or less the kernel is not asked. Linux only.
func WithHandshakes(every time.Duration) Option {
	return func(i *Instruments) { i.config.Handshakes = every }
}

// New makes the instruments with a meter of the provider. Call Add for each listener. The
// error is that of the provider.
//
// A provider takes one Instruments until they are closed, because OpenTelemetry adds up what
// two of them report: the counters of the system would be twice as high. Share them, as
// the provider is shared. New cannot tell that the provider of [go.opentelemetry.io/otel]
// before SetMeterProvider and the one that was set are the same.
func New(provider metric.MeterProvider, opts ...Option) (i *Instruments, err error) {
	if provider == nil {
		return nil, errors.New("acceptqotel: nil MeterProvider")
	}
	i = &Instruments{names: make(map[string]bool)}
	for _, o := range opts {
		if o != nil {
			o(i)
		}
	}
	if reflect.TypeOf(provider).Kind() == reflect.Pointer { // a provider without identity, such as noop's, keeps nothing
		if !reserve(provider) {
			return nil, errors.New("acceptqotel: the MeterProvider has Instruments already: share them, or close them first")
		}
		i.provider = provider
		defer func() {
			if err != nil {
				release(provider)
			}
		}()
	}
	i.config.Export = i.export
	i.set = observe.NewSet(i.config)

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
	i.capacity = upDown("tcp.accept_queue.capacity", "Connections that fit in the accept queue.")
	i.limit = upDown("tcp.accept_queue.limit", "Backlog that the kernel granted to this listener.")
	i.requested = upDown("tcp.accept_queue.requested", "Backlog that the program asked for; absent if it asked for the maximum or if that is unknown.")
	i.heldBack = upDown("tcp.accept_queue.held_back", "Connections that an accept filter holds back from the accept queue.")
	i.shards, err = meter.Int64ObservableUpDownCounter("tcp.accept_queue.shards", metric.WithUnit("{queue}"),
		metric.WithDescription("Queues of this listener whose numbers are added up; absent if it is one."))
	errs = append(errs, err)
	i.drops = counter("tcp.accept_queue.drops", "Packets that this listener dropped for any reason, also those of port scans and health checks, which harm nobody.")
	i.overflows = counter("tcp.listen.overflows", "Packets that met a full accept queue, for all listeners of the network namespace (ListenOverflows).")
	i.lost = counter("tcp.listen.drops", "Overflows, and SYNs dropped for another reason, for all listeners of the network namespace (ListenDrops).")
	i.synDrops = counter("tcp.syn_queue.drops", "SYNs dropped because the SYN queue was full, for all listeners of the network namespace (TCPReqQFullDrop).")
	i.synCookies = counter("tcp.syn_queue.cookies", "SYNs answered with a cookie because the SYN queue was full, for all listeners of the network namespace (TCPReqQFullDoCookies).")
	i.accepted, err = meter.Int64ObservableCounter("tcp.accept_queue.accepted", metric.WithUnit("{connection}"),
		metric.WithDescription("Connections that Accept has returned."))
	errs = append(errs, err)
	i.unknownWaits, err = meter.Int64ObservableCounter("tcp.accept_queue.wait.unknown", metric.WithUnit("{connection}"),
		metric.WithDescription("Connections whose time in the accept queue could not be read."))
	errs = append(errs, err)
	gauge := func(name, unit, help string) metric.Float64ObservableGauge {
		m, err := meter.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(help))
		errs = append(errs, err)
		return m
	}
	i.fullest = gauge("tcp.accept_queue.fullest", "1", "Part of its capacity that the fullest of the shards has in use; absent if there is one queue.")
	i.ceiling, err = meter.Int64ObservableGauge("tcp.accept_queue.ceiling", metric.WithUnit("{connection}"),
		metric.WithDescription("Largest backlog that the system grants now (Linux: net.core.somaxconn)."))
	errs = append(errs, err)
	i.wait, err = meter.Float64Histogram("tcp.accept_queue.wait", metric.WithUnit("s"),
		metric.WithDescription("Time that a connection waited in the accept queue until the program accepted it."),
		metric.WithExplicitBucketBoundaries(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30))
	errs = append(errs, err)
	observed := []metric.Observable{
		i.length, i.capacity, i.limit, i.requested, i.heldBack, i.shards, i.fullest, i.accepted, i.unknownWaits, i.drops,
		i.overflows, i.lost, i.synDrops, i.synCookies, i.ceiling,
	}
	if i.config.Interval > 0 {
		window := i.set.Window().String()
		i.peak = upDown("tcp.accept_queue.length.peak", "Largest length of the accept queue that the sampler saw in the last "+window+".")
		i.fullestPeak = gauge("tcp.accept_queue.fullest.peak", "1", "Largest part of its capacity that a shard had in use in the last "+window+"; absent if there is one queue.")
		observed = append(observed, i.peak, i.fullestPeak)
	}
	if i.config.OldestWait > 0 {
		i.oldest = gauge("tcp.accept_queue.oldest_wait", "s", "Time that the oldest waiting connection has waited in the accept queue.")
		observed = append(observed, i.oldest)
	}
	if i.config.Handshakes > 0 {
		i.handshakes = upDown("tcp.accept_queue.handshakes", "Handshakes in flight on the address of this listener.")
		observed = append(observed, i.handshakes)
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

func reserve(p metric.MeterProvider) bool {
	providers.mu.Lock()
	defer providers.mu.Unlock()
	if providers.used[p] {
		return false
	}
	if providers.used == nil {
		providers.used = make(map[metric.MeterProvider]bool)
	}
	providers.used[p] = true
	return true
}

func release(p metric.MeterProvider) {
	providers.mu.Lock()
	defer providers.mu.Unlock()
	delete(providers.used, p)
}

// Add reports the accept queue of the listener l under a name, which becomes the attribute
// listener of its metrics. l is an [*acceptq.Listener] or any other listening TCP socket,
// such as a [*net.TCPListener]. See [observe.Set.Add] for the errors.
//
// When l is closed it disappears from the metrics, and the name can be used again. The
// histogram of the wait is an exception: OpenTelemetry keeps it, and the next listener of
// the name continues it. Therefore it is an error to use more than 1,900 different names.
func (i *Instruments) Add(name string, l syscall.Conn) (*Queue, error) {
	if err := i.note(name); err != nil {
		return nil, err
	}
	return i.set.Add(name, l)
}

// AddShards is Add for [acceptq.Shards]. The metrics are the sums of all shards, and how
// full the fullest is; or those of each shard with [WithShardLabel].
func (i *Instruments) AddShards(name string, shards *acceptq.Shards) (*Queue, error) {
	if err := i.note(name); err != nil {
		return nil, err
	}
	return i.set.AddShards(name, shards)
}

// note fails if name is one more than the SDK can keep apart.
func (i *Instruments) note(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.names) >= maxNames && !i.names[name] {
		return fmt.Errorf("acceptqotel: report listener %q: %d other names have been used, and OpenTelemetry forgets none: use a name again", name, maxNames)
	}
	return nil
}

// Close removes all listeners and ends the report. The listeners stay open. Afterwards Add
// returns an error.
func (i *Instruments) Close() error {
	i.set.Close()
	err := i.registration.Unregister()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.provider != nil {
		release(i.provider)
		i.provider = nil
	}
	return err
}

// An exporter is what a Queue needs for OpenTelemetry.
type exporter struct {
	labels []metric.MeasurementOption // of each socket, or of their sum
	all    metric.MeasurementOption   // of the listener
	wait   metric.Float64Histogram
}

func (e *exporter) Observe(wait time.Duration) {
	e.wait.Record(context.Background(), wait.Seconds(), e.all)
}

func (*exporter) Remove() {}

func (i *Instruments) export(q *Queue) observe.Exporter {
	i.mu.Lock()
	i.names[q.Name()] = true
	i.mu.Unlock()
	listener := attribute.String("listener", q.Name())
	e := &exporter{all: metric.WithAttributeSet(attribute.NewSet(listener)), wait: i.wait}
	if !i.perShard || q.Len() == 1 {
		e.labels = []metric.MeasurementOption{e.all}
		return e
	}
	for n := range q.Len() {
		e.labels = append(e.labels, metric.WithAttributeSet(attribute.NewSet(listener, attribute.String("shard", strconv.Itoa(n)))))
	}
	return e
}

// collect is called once in each collection.
func (i *Instruments) collect(_ context.Context, o metric.Observer) error {
	report := func(m metric.Int64Observable, value int64, labels ...metric.ObserveOption) {
		if value != unknown {
			o.ObserveInt64(m, value, labels...)
		}
	}
	part := func(m metric.Float64Observable, value float64, labels metric.ObserveOption) {
		if value != unknown {
			o.ObserveFloat64(m, value, labels)
		}
	}
	if s, err := acceptq.ReadSystem(); err == nil {
		report(i.ceiling, int64(s.Ceiling))
		report(i.overflows, s.ListenOverflows)
		report(i.lost, s.ListenDrops)
		report(i.synDrops, s.ReqQFullDrop)
		report(i.synCookies, s.ReqQFullDoCookies)
	}
	var r observe.Reading
	for _, q := range i.set.Queues() {
		if q.Read(&r) != nil {
			continue
		}
		e := q.Exporter().(*exporter)
		numbers := func(n *observe.Numbers, labels metric.ObserveOption) {
			report(i.length, int64(n.Stats.Queued), labels)
			if i.config.Interval > 0 {
				report(i.peak, int64(n.Peak), labels)
			}
			report(i.capacity, int64(n.Stats.Capacity), labels)
			report(i.limit, int64(n.Stats.Limit), labels)
			report(i.requested, int64(n.Requested), labels)
			report(i.heldBack, int64(n.Stats.Incomplete), labels)
			report(i.accepted, n.Accepted, labels)
			report(i.drops, n.Stats.Drops, labels)
		}
		if i.perShard {
			for n := range r.Shards {
				numbers(&r.Shards[n], e.labels[n])
			}
		} else {
			numbers(&r.Numbers, e.all)
			if len(r.Shards) > 1 {
				report(i.shards, int64(len(r.Shards)), e.all)
				if used, known := r.Stats.Utilization(); known && r.Stats.Fullest != nil {
					part(i.fullest, used, e.all)
				}
				if i.config.Interval > 0 {
					part(i.fullestPeak, r.FullestPeak, e.all)
				}
			}
		}
		if r.OldestWait != unknown {
			part(i.oldest, r.OldestWait.Seconds(), e.all)
		}
		if i.config.Handshakes > 0 {
			report(i.handshakes, int64(r.Handshakes), e.all)
		}
		report(i.unknownWaits, r.UnknownWaits, e.all)
	}
	return nil
}
