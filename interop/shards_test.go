package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const (
	shardCount = 4
	callers    = 200 // each with its own connection
	callTime   = 20 * time.Second
)

func listenShards(t *testing.T) *acceptq.Shards {
	t.Helper()
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", shardCount)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// tallied counts what each shard accepts.
type tallied struct {
	mu     sync.Mutex
	counts []*atomic.Int64
}

// each wraps serve so that the listener counts connections.
func (c *tallied) each(serve func(net.Listener) error) func(net.Listener) error {
	return func(ln net.Listener) error {
		n := new(atomic.Int64)
		c.mu.Lock()
		c.counts = append(c.counts, n)
		c.mu.Unlock()
		return serve(talliedListener{ln, n})
	}
}

// reachedAll requires that every shard has accepted connections, and that their sum is n.
func (c *tallied) reachedAll(t *testing.T, n int64) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Len(t, c.counts, shardCount)
	for _, count := range c.counts {
		require.Positive(t, count.Load())
		n -= count.Load()
	}
	require.Zero(t, n)
}

type talliedListener struct {
	net.Listener
	n *atomic.Int64
}

func (l talliedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

// all runs call for each caller, a few at a time, and joins the errors.
func all(call func() error) error {
	var wait sync.WaitGroup
	errs := make([]error, callers)
	room := make(chan struct{}, 20)
	for i := range errs {
		room <- struct{}{}
		wait.Go(func() {
			errs[i] = call()
			<-room
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

func callHealth(ctx context.Context, addr string) error {
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	resp, err := healthpb.NewHealthClient(cc).Check(ctx, new(healthpb.HealthCheckRequest))
	if err == nil && resp.Status != healthpb.HealthCheckResponse_SERVING {
		err = fmt.Errorf("answer %v", resp.Status)
	}
	return err
}

// One gRPC server serves all shards. When it stops, Serve returns the same as the Serve
// of the server, which is nil.
func TestGRPCOverShards(t *testing.T) {
	for name, stop := range map[string]func(*grpc.Server){
		"GracefulStop": (*grpc.Server).GracefulStop,
		"Stop":         (*grpc.Server).Stop,
	} {
		t.Run(name, func(t *testing.T) {
			s := listenShards(t)
			srv := grpc.NewServer()
			healthpb.RegisterHealthServer(srv, health.NewServer())
			var counts tallied
			served := make(chan error, 1)
			go func() { served <- s.Serve(counts.each(srv.Serve)) }()
			require.NoError(t, all(func() error { return callHealth(t.Context(), s.Addr().String()) }))
			counts.reachedAll(t, callers)
			stop(srv)
			require.NoError(t, <-served)
			for l := range s.All() {
				require.ErrorIs(t, l.Close(), net.ErrClosed)
			}
		})
	}
}

// Drain makes shards safe to close: every queued client gets an answer. The control
// closes the same queues without Drain and loses clients.
func TestGRPCDrainsShards(t *testing.T) {
	closeShards(t, func(t *testing.T) (func(net.Listener) error, func(addr string) error) {
		srv := grpc.NewServer()
		t.Cleanup(srv.Stop)
		healthpb.RegisterHealthServer(srv, health.NewServer())
		return srv.Serve, func(addr string) error { return callHealth(t.Context(), addr) }
	})
}

func TestHTTPDrainsShards(t *testing.T) {
	closeShards(t, func(t *testing.T) (func(net.Listener) error, func(addr string) error) {
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "served")
		})}
		t.Cleanup(func() { srv.Close() })
		return srv.Serve, get
	})
}

// closeShards closes the listeners of a server that starts to accept when all its
// clients are in the queues: once after Drain, and once without Drain.
func closeShards(t *testing.T, newServer func(t *testing.T) (serve func(net.Listener) error, call func(addr string) error)) {
	for _, drained := range []bool{true, false} {
		t.Run(map[bool]string{true: "drained", false: "not drained"}[drained], func(t *testing.T) {
			s := listenShards(t)
			serve, call := newServer(t)
			results := make(chan error, callers)
			for range callers {
				go func() { results <- call(s.Addr().String()) }()
			}
			require.Eventually(t, func() bool {
				q, err := s.Stats()
				return err == nil && q.Queued == callers
			}, callTime, time.Millisecond)

			served := make(chan error, 1)
			go func() { served <- s.Serve(func(ln net.Listener) error { return serve(slowListener{ln}) }) }()
			require.Eventually(t, func() bool {
				q, err := s.Stats()
				return err == nil && q.Queued < callers
			}, callTime, time.Millisecond)
			if drained {
				require.NoError(t, s.Drain(within(t, callTime)))
				q, err := s.Stats()
				require.NoError(t, err)
				require.Zero(t, q.Queued)
			}
			s.Close() // if Drain returned nil, this resets no client
			require.ErrorIs(t, <-served, net.ErrClosed)
			lost := 0
			for range callers {
				if err := <-results; err != nil {
					lost++
					if drained {
						t.Error(err)
					}
				}
			}
			if !drained {
				require.Positive(t, lost, "no client is lost without Drain: this test shows nothing")
			}
			t.Logf("%d of %d lost", lost, callers)
		})
	}
}

// slowListener needs a millisecond for each connection, so that its queue does not empty at
// once.
type slowListener struct{ net.Listener }

func (l slowListener) Accept() (net.Conn, error) {
	<-time.After(time.Millisecond)
	return l.Listener.Accept()
}

func TestHTTPOverShards(t *testing.T) {
	s := listenShards(t)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "served")
	})}
	var counts tallied
	served := make(chan error, 1)
	go func() { served <- s.Serve(counts.each(srv.Serve)) }()
	client := &http.Client{Timeout: callTime, Transport: &http.Transport{DisableKeepAlives: true}}
	require.NoError(t, all(func() error {
		resp, err := client.Get("http://" + s.Addr().String())
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && string(body) != "served" {
			err = fmt.Errorf("answer %q", body)
		}
		return err
	}))
	counts.reachedAll(t, callers)
	require.NoError(t, srv.Shutdown(t.Context()))
	require.True(t, <-served == http.ErrServerClosed, "Serve must return http.ErrServerClosed unwrapped")
}
