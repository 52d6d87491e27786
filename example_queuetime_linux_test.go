package acceptq_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/acceptq/acceptq"
)

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
