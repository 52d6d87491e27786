package interop

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// The ways to stop a gRPC server.
const (
	gracefulStop = iota // closes the listener first, like Shutdown of net/http
	drainAndStop        // Drain, then GracefulStop
	recipe              // Drain, wait until the server has written to every connection, GracefulStop
)

// GracefulStop lets the calls finish that gRPC serves. But it closes a connection that
// gRPC has accepted and not yet begun to serve. So a server must wait between Drain and
// GracefulStop until it has written to every connection, as with net/http.
func TestDrainGRPC(t *testing.T) {
	inEachWay(t, func(t *testing.T) {
		lost := make(map[int]int64)
		for how, name := range []string{"GracefulStop", "Drain, GracefulStop", "Drain, all greeted, GracefulStop"} {
			c := grpcRestarts(t, 20, how)
			lost[how] = c.lost.Load()
			t.Logf("%s: %d calls answered, %d lost, the first: %v", name, c.ok.Load(), c.lost.Load(), c.failure())
		}
		if lost[gracefulStop] < 20 {
			t.Error("GracefulStop alone loses almost no calls: the load is too low to show the effect of Drain")
		}
		if lost[drainAndStop] >= lost[gracefulStop] {
			t.Error("Drain reduces no losses")
		}
		if lost[recipe] != 0 {
			t.Error("the recipe loses calls")
		}
	})
}

// A greeter is a listener that records the connections to which the server has not
// written yet. A gRPC server writes first.
type greeter struct {
	net.Listener
	pending sync.Map
}

type greeted struct {
	net.Conn
	by *greeter
}

func (g *greeter) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	conn := &greeted{c, g}
	g.pending.Store(conn, nil)
	return conn, nil
}

func (c *greeted) Write(p []byte) (int, error) {
	c.by.pending.Delete(c)
	return c.Conn.Write(p)
}

func (c *greeted) Close() error {
	c.by.pending.Delete(c)
	return c.Conn.Close()
}

func (g *greeter) none() bool {
	none := true
	g.pending.Range(func(any, any) bool { none = false; return false })
	return none
}

func grpcRestarts(t *testing.T, restarts, how int) *crowd {
	addr := "127.0.0.1:0"
	var clients *crowd
	for i := range restarts + 1 {
		ln, err := acceptq.ListenTCP(addr)
		if err != nil {
			t.Fatal(err)
		}
		if clients == nil {
			addr = ln.Addr().String()
		}
		var calls atomic.Int64
		srv := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			calls.Add(1)
			return h(ctx, req)
		}))
		grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
		served := make(chan error, 1)
		door := &greeter{Listener: ln}
		go func() { served <- srv.Serve(door) }()
		if clients == nil {
			clients = newCrowd(16, func(int) error { return call(addr) })
		}
		until(t, "calls", func() bool { return calls.Load() >= 20 })
		if i == restarts { // the last server serves the clients until they end
			clients.end()
		}
		if how != gracefulStop {
			if err := ln.Drain(within(t, patience)); err != nil {
				t.Error(err)
			}
		}
		if how == recipe {
			until(t, "the greetings", door.none)
		}
		srv.GracefulStop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
	return clients
}

// call makes one unary call on a new connection. A server that stops may send GOAWAY
// before the call. Then gRPC connects again, and the next server answers the call. But
// the server must not close a connection on which it has sent nothing. gRPC would hide
// that by connecting again, so the test checks it on the connection itself.
func call(addr string) error {
	conn, err := dial(addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	<-time.After(5 * time.Millisecond) // the duration of this handshake
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	first := &listened{Conn: conn}
	var used atomic.Bool
	client, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if used.CompareAndSwap(false, true) {
				return first, nil
			}
			for {
				c, err := dial(addr)
				if err == nil || ctx.Err() != nil {
					return c, err
				}
				<-time.After(time.Millisecond)
			}
		}))
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = grpc_health_v1.NewHealthClient(client).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err == nil && !first.heard.Load() {
		err = errors.New("closed without any data")
	}
	return err
}

// A listened connection records whether its client has received data.
type listened struct {
	net.Conn
	heard atomic.Bool
}

func (c *listened) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.heard.Store(true)
	}
	return n, err
}
