package acceptq_test

import (
	"expvar"
	"fmt"
	"log"
	"net"
	"net/http"

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
	// 4 queues: 0 queued of 12 (0%), limit 8, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
	// 0 queued of 3 (0%), limit 2, drops 0
}
