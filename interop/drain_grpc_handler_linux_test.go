package interop

import (
	"context"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// A kind of server serves ln and calls answered at each request. stop stops it,
// by the best way that there is or, without drain, as its documentation says.
type kind func(t *testing.T, ln *acceptq.Listener, answered func()) (stop func(drain bool))

// restartServer restarts it under clients that come all the time. The next server
// listens before the one that it follows stops.
func restartServer(t *testing.T, s kind, drain bool, visit func(addr string) error) *crowd {
	const restarts = 20
	addr := "127.0.0.1:0"
	var answered atomic.Int64
	start := func() func(bool) {
		ln, err := acceptq.ListenTCP(addr, acceptq.WithReusePort())
		if err != nil {
			t.Fatal(err)
		}
		addr = ln.Addr().String()
		return s(t, ln, func() { answered.Add(1) })
	}
	stop := start()
	known := addr // which start writes again, though it stays the same
	clients := newCrowd(16, func(int) error { return visit(known) })
	for range restarts {
		want := answered.Load() + 20
		until(t, "answers", func() bool { return answered.Load() >= want })
		next := start()
		stop(drain)
		stop = next
	}
	clients.end()
	stop(drain)
	return clients
}

func losesNone(t *testing.T, s kind, visit func(addr string) error) {
	without := restartServer(t, s, false, visit)
	t.Logf("without Drain: %d answered, %d lost, the first: %v", without.ok.Load(), without.lost.Load(), without.failure())
	with := restartServer(t, s, true, visit)
	t.Logf("with: %d answered, %d lost, the first: %v", with.ok.Load(), with.lost.Load(), with.failure())
	if without.lost.Load() == 0 {
		t.Error("nobody is lost without Drain: the test has no load")
	}
	if with.lost.Load() != 0 {
		t.Error("some are lost")
	}
}

// gRPC's handler behind net/http stops as every handler does.
func TestDrainGRPCHandler(t *testing.T) {
	losesNone(t, func(t *testing.T, ln *acceptq.Listener, answered func()) func(bool) {
		rpc := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			answered()
			return h(ctx, req)
		}))
		grpc_health_v1.RegisterHealthServer(rpc, health.NewServer())
		srv := &http.Server{Handler: rpc, Protocols: new(http.Protocols)}
		srv.Protocols.SetUnencryptedHTTP2(true)
		ctx, term := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- graceful.Serve(ctx, srv, ln) }()
		return func(drain bool) {
			if !drain {
				srv.Shutdown(t.Context())
			}
			term()
			if err := <-served; err != nil && drain {
				t.Error(err)
			}
		}
	}, call(insecure.NewCredentials(), unary))
}
