package interop

import (
	"context"
	"fmt"
	"log"
	"net/http"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// A gRPC server that loses no call when it is restarted: net/http serves its handler,
// and package graceful stops it. A program of yours gets ctx from
// signal.NotifyContext.
func Example_grpc() {
	ctx, stop := context.WithCancel(context.Background())
	rpc := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(rpc, health.NewServer())
	srv := &http.Server{Handler: rpc, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true) // without TLS; or graceful.ServeTLS

	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort())
	if err != nil {
		log.Fatal(err)
	}
	client, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	answers := make(chan string, 1)
	go func() {
		answer, err := grpc_health_v1.NewHealthClient(client).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{})
		answers <- fmt.Sprint(answer.GetStatus(), " ", err)
		stop()
	}()
	err = graceful.Serve(ctx, srv, ln)
	fmt.Println(<-answers, err)
	// Output: SERVING <nil> <nil>
}
