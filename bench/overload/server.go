//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq"
)

type lateKey struct{}

// serve runs the server: net/http on a listener with a limited number of connections,
// as with golang.org/x/net/netutil.LimitListener. So clients wait in the accept queue.
func serve(args []string) error {
	backlog, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	budget, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	heedsClient, adapts := args[2] == "true", args[3] == "true"
	var queue standing
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(backlog), acceptq.WithStrictBacklog())
	if err != nil {
		return err
	}
	var worked, wasted, shed atomic.Int64
	srv := &http.Server{
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			waited, err := acceptq.QueueTime(c)
			if err != nil {
				fmt.Fprintln(os.Stderr, "overload:", err)
				os.Exit(1) // the figures would be wrong
			}
			allowed := budget
			if adapts && queue.stands(time.Now(), waited) {
				allowed = 2 * target
			}
			late := budget > 0 && waited > allowed
			return context.WithValue(ctx, lateKey{}, late)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Context().Value(lateKey{}).(bool) {
				shed.Add(1)
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			gone := r.Context().Done()
			if !heedsClient {
				gone = nil
			}
			select {
			case <-time.After(work):
				worked.Add(1)
			case <-gone:
			}
			if r.Context().Err() != nil {
				wasted.Add(1)
			}
			io.WriteString(w, "done")
		}),
	}
	srv.SetKeepAlivesEnabled(false)
	go srv.Serve(&limited{Listener: ln, slots: make(chan struct{}, workers)})
	fmt.Println(ln.Addr())
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	fmt.Printf("%d worked %d wasted %d shed\n", worked.Load(), wasted.Load(), shed.Load())
	return nil
}

// A standing queue is a queue in which, during a whole interval, no client has waited
// for less than the target. The interval is as long as the budget. The term is from RFC
// 8289. In "Fail at Scale" the limit for the wait is short only during a standing
// queue. net/http calls stands from the one goroutine that accepts.
type standing struct {
	ends  time.Time     // of the interval
	least time.Duration // the shortest wait in it
	stood bool          // in the interval before
}

func (s *standing) stands(now time.Time, waited time.Duration) bool {
	if now.After(s.ends) {
		s.stood = !s.ends.IsZero() && s.least > target
		s.ends, s.least = now.Add(budget), waited
	}
	s.least = min(s.least, waited)
	return s.stood
}

// A limited listener calls Accept only while there is a free slot.
type limited struct {
	net.Listener
	slots chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &slotted{TCPConn: c.(*net.TCPConn), free: sync.OnceFunc(func() { <-l.slots })}, nil
}

type slotted struct {
	*net.TCPConn
	free func()
}

func (c *slotted) Close() error {
	err := c.TCPConn.Close()
	c.free()
	return err
}
