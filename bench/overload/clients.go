//go:build linux

package main

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A crowd is the clients of one server. They are independent: the number of new clients
// does not depend on the number of answers.
type crowd struct {
	addr                          string
	counting                      atomic.Bool
	came, tried, good, turnedAway atomic.Int64
	mu                            sync.Mutex
	waits                         []time.Duration // of the good answers
}

func newCrowd(addr string) *crowd { return &crowd{addr: addr} }

// come starts clients at random times, at the given rate. Only clients that start after
// the time warm are counted, until the end.
func (c *crowd) come(rate float64, warm, measured time.Duration) {
	var clients sync.WaitGroup
	start := time.Now()
	for next := start; ; {
		next = next.Add(time.Duration(rand.ExpFloat64() / rate * float64(time.Second)))
		time.Sleep(time.Until(next))
		since := time.Since(start)
		c.counting.Store(since > warm && since <= warm+measured)
		if since > warm+measured {
			break
		}
		if since > warm {
			c.came.Add(1)
		}
		clients.Go(c.visit)
	}
	clients.Wait()
}

// visit is one client. It gives up after a second and tries again. If the server asks
// it to wait, it waits first.
func (c *crowd) visit() {
	for range tries {
		counting := c.counting.Load()
		start := time.Now()
		status := c.try(start.Add(patience))
		took := time.Since(start)
		if took > patience { // this process handled its timer late
			status = 0
		}
		if counting {
			c.tried.Add(1)
		}
		switch {
		case status == http.StatusOK:
			// An answer is good if it came while clients are counted.
			if c.counting.Load() {
				c.good.Add(1)
				c.mu.Lock()
				c.waits = append(c.waits, took)
				c.mu.Unlock()
			}
			return
		case status == http.StatusServiceUnavailable:
			if counting {
				c.turnedAway.Add(1)
			}
			time.Sleep(time.Second + rand.N(time.Second)) // Retry-After, and a random time so that clients do not run in step
		}
	}
}

// try sends a request on a new connection and returns the status of the answer, or 0 if
// no answer came in time.
func (c *crowd) try(deadline time.Time) (status int) {
	d := net.Dialer{Deadline: deadline, KeepAlive: -1}
	conn, err := d.Dial("tcp4", c.addr)
	if err != nil {
		return 0
	}
	defer conn.Close()
	conn.SetDeadline(deadline)
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: overload\r\n\r\n"); err != nil {
		return 0
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// report returns the figures in Go's benchmark format.
func (c *crowd) report(measured time.Duration) string {
	slices.Sort(c.waits)
	at := func(part float64) time.Duration {
		if len(c.waits) == 0 {
			return 0
		}
		return c.waits[min(len(c.waits)-1, int(part*float64(len(c.waits))))]
	}
	seconds := measured.Seconds()
	text := fmt.Sprintf("%.1f good/s %.1f came/s %.1f tried/s %.1f turned-away/s",
		float64(c.good.Load())/seconds, float64(c.came.Load())/seconds, float64(c.tried.Load())/seconds, float64(c.turnedAway.Load())/seconds)
	if len(c.waits) > 0 { // without an answer there is no time
		text += fmt.Sprintf(" %d p50-ns %d p99-ns", at(0.5), at(0.99))
	}
	return text
}
