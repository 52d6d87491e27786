// Command acceptq-exporter reports the accept queues of all programs of a Linux machine to
// Prometheus, at /metrics. It sees the network namespace in which it runs.
package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	acceptqprom "github.com/acceptq/acceptq/prom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("acceptq-exporter: ")
	addr := flag.String("listen", ":10511", "address of /metrics")
	most := flag.Int("max", 200, "how many listeners are reported one by one")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("unexpected argument %q", flag.Arg(0))
	}
	machine, err := acceptqprom.NewMachineCollector(acceptqprom.WithMaxListeners(*most))
	if err != nil {
		log.Fatal(err)
	}
	prometheus.MustRegister(machine)
	ln, err := acceptq.ListenTCP(*addr)
	if err != nil {
		log.Fatal(err)
	}
	log.Print("listening on ", ln.Addr())
	if !machine.ProcessesKnown() {
		log.Print("some processes cannot be read, so the label process may be empty; the capabilities CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH usually allow it")
	}
	http.Handle("GET /metrics", promhttp.Handler())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := graceful.Serve(ctx, &http.Server{ReadHeaderTimeout: 10 * time.Second}, ln); err != nil {
		log.Fatal(err)
	}
}
