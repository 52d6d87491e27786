package acceptqotel_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"slices"

	"github.com/acceptq/acceptq"
	acceptqotel "github.com/acceptq/acceptq/otel"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// A web server reports its accept queue and how long its clients waited in it.
func Example() {
	reader := metric.NewManualReader() // or a PeriodicReader with the OTLP exporter
	provider := metric.NewMeterProvider(metric.WithReader(reader))
	defer provider.Shutdown(context.Background())

	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(100))
	if err != nil {
		log.Fatal(err)
	}
	queues, err := acceptqotel.New(provider) // or otel.GetMeterProvider()
	if err != nil {
		log.Fatal(err)
	}
	defer queues.Close()
	api, err := queues.Add("api", ln)
	if err != nil {
		log.Fatal(err)
	}
	srv := &http.Server{ConnContext: api.ConnContext}
	go srv.Serve(ln)
	defer srv.Close()

	resp, err := http.Get("http://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	resp.Body.Close()
	var data metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &data); err != nil {
		log.Fatal(err)
	}
	for _, m := range data.ScopeMetrics[0].Metrics {
		if slices.Contains([]string{"tcp.accept_queue.capacity", "tcp.accept_queue.limit", "tcp.accept_queue.wait"}, m.Name) {
			fmt.Println(m.Name, m.Unit)
		}
	}
	// Output:
	// tcp.accept_queue.capacity {connection}
	// tcp.accept_queue.limit {connection}
	// tcp.accept_queue.wait s
}
