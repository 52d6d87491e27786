// A whole server that uses every published package.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	acceptqotel "github.com/acceptq/acceptq/otel"
	"github.com/acceptq/acceptq/overload"
	acceptqprom "github.com/acceptq/acceptq/prom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(16))
	if err != nil {
		return err
	}

	scraped := acceptqprom.NewCollector()
	prometheus.MustRegister(scraped)
	queue, err := scraped.Add("api", ln)
	if err != nil {
		return err
	}
	reader := sdk.NewManualReader()
	pushed, err := acceptqotel.New(sdk.NewMeterProvider(sdk.WithReader(reader)))
	if err != nil {
		return err
	}
	if _, err := pushed.Add("api", ln); err != nil {
		return err
	}

	shed := overload.NewShedder(time.Second)
	http.Handle("/metrics", promhttp.Handler())
	http.Handle("/healthz", overload.Health(time.Second, ln))
	http.HandleFunc("/otel", func(w http.ResponseWriter, r *http.Request) {
		var all metricdata.ResourceMetrics
		if err := reader.Collect(r.Context(), &all); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for _, scope := range all.ScopeMetrics {
			for _, m := range scope.Metrics {
				fmt.Fprintln(w, m.Name)
			}
		}
	})
	srv := &http.Server{
		Handler: shed.Handler(http.DefaultServeMux),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return shed.ConnContext(queue.ConnContext(ctx, c), c)
		},
	}
	fmt.Println(ln.Addr())
	return graceful.Serve(ctx, srv, ln)
}
