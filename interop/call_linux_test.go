package interop

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// call makes one call on a new connection. A server that stops may send GOAWAY before the
// call. Then gRPC connects again, and the next server answers the call. But the server must
// not close a connection on which it has sent nothing. gRPC would hide that by connecting
// again, so the test checks it on the connection itself.
func call(creds credentials.TransportCredentials, ask func(context.Context, *grpc.ClientConn) error) func(addr string) error {
	return func(addr string) error {
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
			grpc.WithTransportCredentials(creds),
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
		err = ask(ctx, client)
		if err == nil && !first.heard.Load() {
			err = errors.New("closed without any data")
		}
		return err
	}
}

func unary(ctx context.Context, c *grpc.ClientConn) error {
	_, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
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
