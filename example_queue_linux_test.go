package acceptq_test

import (
	"context"
	"expvar"
	"fmt"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/acceptq/acceptq"
)

// Publish the accept queue at /debug/vars. Each request for that page reads the queue
// from the kernel.
func ExampleListener_Stats() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(2))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	queue := expvar.Func(func() any {
		s, err := ln.Stats()
		if err != nil {
			return err.Error()
		}
		return s
	})
	expvar.Publish("acceptQueue", queue)

	s, err := ln.Stats()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(s)
	fmt.Println(queue)
	// Output:
	// 0 queued of 3 (0%), limit 2, drops 0
	// {"queued":0,"incomplete":null,"limit":2,"capacity":3,"drops":0}
}

// Lengthen the queue of a running server. Its clients do not notice.
func ExampleListener_SetBacklog() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(2))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	b, err := ln.SetBacklog(4)
	if err != nil {
		log.Fatal(err)
	}
	if b.Clamped() {
		log.Print(b) // names the setting to raise
	}
	fmt.Println("room for", b.Capacity)
	// Output: room for 5
}

// Read the queue of a listener that other code has opened. The server keeps using its own
// listener.
func ExampleWrap() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	go http.Serve(ln, nil)

	queue, err := acceptq.Wrap(ln)
	if err != nil {
		log.Fatal(err)
	}
	s, err := queue.Stats()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Queued, "queued")
	// Output: 0 queued
}

// Open four queues on one address, if the ceiling cannot be raised.
func ExampleShards() {
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 4, acceptq.WithBacklog(2))
	if err != nil {
		log.Fatal(err)
	}
	defer shards.Close()
	go shards.Serve(new(http.Server).Serve)

	total, err := shards.Stats()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(shards.Len(), "queues:", total)
	for ln := range shards.All() {
		s, err := ln.Stats()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(s)
	}
	// Output:
	// 4 queues: 0 queued of 12, fullest shard 0 of 3 (0%), limit 8, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
}

// A web server answers 503 at once to a client that has waited for longer than half a
// second. That client has probably given up, so work for it would be wasted.
func ExampleQueueTime() {
	const budget = 500 * time.Millisecond
	type queueTimeKey struct{}

	work := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "hello")
	})
	srv := &http.Server{
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			waited, err := acceptq.QueueTime(c)
			if err != nil {
				return ctx // the system does not report the time: serve the client
			}
			return context.WithValue(ctx, queueTimeKey{}, waited)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if waited, ok := r.Context().Value(queueTimeKey{}).(time.Duration); ok && waited > budget {
				w.Header().Set("Retry-After", "1")
				w.Header().Set("Connection", "close") // the next request comes on a new connection
				http.Error(w, "overloaded", http.StatusServiceUnavailable)
				return
			}
			work.ServeHTTP(w, r)
		}),
	}

	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(ln)
	defer srv.Close()

	resp, err := http.Get("http://" + ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	fmt.Println(resp.StatusCode)
	// Output: 200
}

// A server has stopped calling Accept. Another goroutine lists the waiting clients.
func ExampleListener_Waiting() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for s, _ := ln.Stats(); s.Queued < 1; s, _ = ln.Stats() { // the last packet is still in flight
		time.Sleep(time.Millisecond)
	}

	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	waiting, err := ln.Waiting(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, w := range waiting {
		fmt.Println(w.Client.String() == client.LocalAddr().String(), w.Received, w.Closed)
	}
	// Output: true 0 false
}
