package interop

import (
	"context"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	acceptqotel "github.com/acceptq/acceptq/otel"
	acceptqprom "github.com/acceptq/acceptq/prom"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/consumer/consumertest"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/receiver/receivertest"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
)

// startReceiver starts the OTLP receiver of the OpenTelemetry Collector.
func startReceiver(t *testing.T) (address string, sink *consumertest.MetricsSink) {
	t.Helper()
	sink = new(consumertest.MetricsSink)
	factory := otlpreceiver.NewFactory()
	config := factory.CreateDefaultConfig()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address = free.Addr().String()
	free.Close() // the receiver does not tell which port it got, so it is given one
	require.NoError(t, confmap.NewFromStringMap(map[string]any{
		"protocols": map[string]any{"grpc": map[string]any{"endpoint": address}},
	}).Unmarshal(config))
	r, err := factory.CreateMetrics(t.Context(), receivertest.NewNopSettings(factory.Type()), config, sink)
	require.NoError(t, err)
	require.NoError(t, r.Start(context.Background(), componenttest.NewNopHost()))
	t.Cleanup(func() { require.NoError(t, r.Shutdown(context.Background())) })
	return address, sink
}

// A server whose queue has overflowed sends its metrics by OTLP to the Collector's receiver.
func TestCollector(t *testing.T) {
	address, sink := startReceiver(t)
	exporter, err := otlpmetricgrpc.New(t.Context(), otlpmetricgrpc.WithEndpoint(address), otlpmetricgrpc.WithInsecure())
	require.NoError(t, err)
	provider := metric.NewMeterProvider(metric.WithReader(metric.NewPeriodicReader(exporter, metric.WithInterval(time.Hour))))
	defer provider.Shutdown(context.Background())
	queues, err := acceptqotel.New(provider, acceptqotel.WithSampler(10*time.Millisecond, time.Minute))
	require.NoError(t, err)
	defer queues.Close()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(2))
	require.NoError(t, err)
	defer ln.Close()
	api, err := queues.Add("api", ln)
	require.NoError(t, err)

	overflow(t, ln)
	stats, err := ln.Stats()
	require.NoError(t, err)
	require.NoError(t, provider.ForceFlush(t.Context()))
	got := received(sink)
	require.EqualValues(t, stats.Capacity, got["tcp.accept_queue.length"].IntValue(), "the queue is full")
	require.EqualValues(t, stats.Capacity, got["tcp.accept_queue.length.peak"].IntValue())
	require.GreaterOrEqual(t, got["tcp.accept_queue.drops"].IntValue(), stats.Drops)
	require.EqualValues(t, stats.Limit, got["tcp.accept_queue.limit"].IntValue())
	require.NotContains(t, got, "tcp.accept_queue.held_back", "what is unknown is absent")

	require.Eventually(t, func() bool { // longer than a tick of the kernel's clock
		waiting, err := ln.Waiting(t.Context())
		return err == nil && len(waiting) > 0 && waiting[0].Waited >= 20*time.Millisecond
	}, 20*time.Second, time.Millisecond)
	srv := &http.Server{ConnContext: api.ConnContext, Handler: http.NotFoundHandler()}
	go srv.Serve(ln)
	defer srv.Close()
	resp, err := http.Get("http://" + ln.Addr().String()) // after those that wait
	require.NoError(t, err)
	resp.Body.Close()
	require.NoError(t, provider.ForceFlush(t.Context()))
	wait := waits(sink)
	require.GreaterOrEqual(t, wait.Count(), uint64(stats.Capacity+1))
	require.Positive(t, wait.Sum())
}

// overflow fills the queue of ln and lets one more client meet it full. Its drops say that
// it did.
func overflow(t *testing.T, ln *acceptq.Listener) {
	t.Helper()
	for range ln.Backlog().Capacity {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), 20*time.Second)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String()); err == nil {
			c.Close()
		}
	}()
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Drops > 0
	}, 20*time.Second, time.Millisecond)
	cancel()
	<-done
}

// received returns the last number of each metric that the receiver got.
func received(sink *consumertest.MetricsSink) map[string]pmetric.NumberDataPoint {
	got := make(map[string]pmetric.NumberDataPoint)
	each(sink, func(m pmetric.Metric) {
		switch m.Type() {
		case pmetric.MetricTypeSum:
			got[m.Name()] = m.Sum().DataPoints().At(0)
		case pmetric.MetricTypeGauge:
			got[m.Name()] = m.Gauge().DataPoints().At(0)
		}
	})
	return got
}

func waits(sink *consumertest.MetricsSink) (h pmetric.HistogramDataPoint) {
	h = pmetric.NewHistogramDataPoint()
	each(sink, func(m pmetric.Metric) {
		if m.Name() == "tcp.accept_queue.wait" {
			h = m.Histogram().DataPoints().At(0)
		}
	})
	return h
}

func each(sink *consumertest.MetricsSink, f func(pmetric.Metric)) {
	for _, all := range sink.AllMetrics() {
		for _, r := range all.ResourceMetrics().All() {
			for _, s := range r.ScopeMetrics().All() {
				for _, m := range s.Metrics().All() {
					f(m)
				}
			}
		}
	}
}

// By way of OpenTelemetry, Prometheus gets the names of acceptqprom, so that the same alert
// rules and the same dashboard serve both.
func TestSameNamesInPrometheus(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(7))
	require.NoError(t, err)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()

	direct := prometheus.NewRegistry()
	collector := acceptqprom.NewCollector(acceptqprom.WithSampler(10*time.Millisecond, time.Minute), acceptqprom.WithOldestWait(5*time.Second), acceptqprom.WithHandshakes(5*time.Second))
	defer collector.Close()
	direct.MustRegister(collector)
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
	require.NoError(t, err)
	defer shards.Close()
	several, err := collector.AddShards("shards", shards)
	require.NoError(t, err)
	several.Observe(accepted)
	q, err := collector.Add("api", ln)
	require.NoError(t, err)
	q.Observe(accepted)

	byOTel := prometheus.NewRegistry()
	exporter, err := otelprom.New(otelprom.WithRegisterer(byOTel), otelprom.WithoutTargetInfo())
	require.NoError(t, err)
	provider := metric.NewMeterProvider(metric.WithReader(exporter))
	defer provider.Shutdown(context.Background())
	instruments, err := acceptqotel.New(provider, acceptqotel.WithSampler(10*time.Millisecond, time.Minute), acceptqotel.WithOldestWait(5*time.Second), acceptqotel.WithHandshakes(5*time.Second))
	require.NoError(t, err)
	defer instruments.Close()
	several, err = instruments.AddShards("shards", shards)
	require.NoError(t, err)
	several.Observe(accepted)
	o, err := instruments.Add("api", ln)
	require.NoError(t, err)
	o.Observe(accepted)

	want := names(t, direct)
	require.Contains(t, strings.Join(want, "\n"), "tcp_accept_queue_drops_total COUNTER listener")
	require.Equal(t, want, names(t, byOTel))
}

// names returns the name, the type and the labels of each metric, without the labels of
// OpenTelemetry's scope.
func names(t *testing.T, reg prometheus.Gatherer) (list []string) {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.Metric {
			labels := slices.DeleteFunc(m.Label, func(l *dto.LabelPair) bool { return strings.HasPrefix(l.GetName(), "otel_scope_") })
			line := f.GetName() + " " + f.GetType().String()
			for _, l := range labels {
				line += " " + l.GetName()
			}
			list = append(list, line)
		}
	}
	return list
}
