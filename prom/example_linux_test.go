package acceptqprom_test

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"time"

	"github.com/acceptq/acceptq"
	acceptqprom "github.com/acceptq/acceptq/prom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A web server reports its accept queue and how long its clients waited in it.
func Example() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(100))
	if err != nil {
		log.Fatal(err)
	}
	queues := acceptqprom.NewCollector(acceptqprom.WithSampler(10*time.Millisecond, time.Minute))
	prometheus.MustRegister(queues)
	api, err := queues.Add("api", ln)
	if err != nil {
		log.Fatal(err)
	}

	http.Handle("/metrics", promhttp.Handler())
	srv := &http.Server{ConnContext: api.ConnContext}
	go srv.Serve(ln)
	defer srv.Close()

	resp, err := http.Get("http://" + ln.Addr().String() + "/metrics")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	show(resp.Body, `tcp_accept_queue_length{`, `tcp_accept_queue_capacity{`, `tcp_accept_queue_requested{`,
		`tcp_accept_queue_wait_seconds_count{`)
	// Output:
	// tcp_accept_queue_capacity{listener="api"} 101
	// tcp_accept_queue_length{listener="api"} 0
	// tcp_accept_queue_requested{listener="api"} 100
	// tcp_accept_queue_wait_seconds_count{listener="api"} 1
}

// A server that has no hook for new connections gets a listener that observes them.
func ExampleQueue_Listener() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	queues := acceptqprom.NewCollector()
	echo, err := queues.Add("echo", ln)
	if err != nil {
		log.Fatal(err)
	}

	// With gRPC: grpcServer.Serve(echo.Listener(ln)).
	served := make(chan struct{})
	go func() {
		defer close(served)
		serveEcho(echo.Listener(ln))
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprint(c, "hello")
	c.(*net.TCPConn).CloseWrite()
	answer, _ := io.ReadAll(c)
	fmt.Printf("%s\n", answer)

	scrape(queues, `tcp_accept_queue_wait_seconds_count{`)
	ln.Close()
	<-served
	scrape(queues, `tcp_accept_queue_wait_seconds_count{`) // nothing: ln is closed
	// Output:
	// hello
	// tcp_accept_queue_wait_seconds_count{listener="echo"} 1
}

// Shards can be reported one by one.
func ExampleWithShardLabel() {
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2, acceptq.WithBacklog(10))
	if err != nil {
		log.Fatal(err)
	}
	defer shards.Close()
	queues := acceptqprom.NewCollector(acceptqprom.WithShardLabel())
	if _, err := queues.AddShards("api", shards); err != nil {
		log.Fatal(err)
	}
	scrape(queues, "tcp_accept_queue_capacity{")
	// Output:
	// tcp_accept_queue_capacity{listener="api",shard="0"} 11
	// tcp_accept_queue_capacity{listener="api",shard="1"} 11
}

// A program of its own reports every server of the machine, as acceptq-exporter does.
func ExampleNewMachineCollector() {
	machine, err := acceptqprom.NewMachineCollector(acceptqprom.WithMaxListeners(500))
	if err != nil {
		log.Fatal(err) // this is not Linux, for example
	}
	if !machine.ProcessesKnown() {
		log.Print("some processes may not be read, so the label process may be empty")
	}

	// A server that knows nothing of it.
	ln, err := net.Listen("tcp", "127.11.11.11:8080")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	scrape(machine, `tcp_accept_queue_length{address="127.11.11.11:8080"`)
	// Output:
	// tcp_accept_queue_length{address="127.11.11.11:8080",listener="server 127.11.11.11:8080",process="server"} 0
}

func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	}
}

// scrape prints the lines of a scrape that begin with one of the prefixes.
func scrape(c prometheus.Collector, prefixes ...string) {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	rec := httptest.NewRecorder()
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	show(rec.Body, prefixes...)
}

// show calls this program "server", whatever name its test binary has.
func show(r io.Reader, prefixes ...string) {
	text, _ := io.ReadAll(r)
	name, _ := os.ReadFile("/proc/self/comm")
	text = bytes.ReplaceAll(text, bytes.TrimSpace(name), []byte("server"))
	for line := range strings.Lines(string(text)) {
		for _, p := range prefixes {
			if strings.HasPrefix(line, p) {
				fmt.Print(line)
			}
		}
	}
}
