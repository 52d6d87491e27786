package interop

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/soheilhy/cmux"
	"github.com/stretchr/testify/require"
	"github.com/valyala/fasthttp"
	"golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func init() { helpers["run"] = runHelper }

// The environment variables of a server process.
const (
	kindEnv    = helperEnv + "_KIND"
	addrEnv    = helperEnv + "_ADDR"
	controlEnv = helperEnv + "_CONTROL"
)

// A program serves ln until ctx ends, with package graceful or, as a control, with what the
// server has of its own. visit is what a client does, over and over. It repeats nothing.
type program struct {
	serve   func(ctx context.Context, ln *acceptq.Listener) error
	control func(ctx context.Context, ln *acceptq.Listener) error
	visit   func(addr string) (visit func() error, leave func())
}

var programs = map[string]program{
	"gRPC, unary":           {serveRPC(nil), stopRPC(nil), once(call(insecure.NewCredentials(), unary))},
	"gRPC, unary, TLS":      {serveRPC(serverTLS), stopRPC(serverTLS), once(call(clientTLS, unary))},
	"gRPC, streams":         {serveRPC(nil), stopRPC(nil), once(call(insecure.NewCredentials(), stream))},
	"gRPC, streams, TLS":    {serveRPC(serverTLS), stopRPC(serverTLS), once(call(clientTLS, stream))},
	"fasthttp":              {serveFast, stopFast, once(getLater)},
	"fasthttp, kept alive":  {serveFastKept, stopFast, getKept},
	"ssh":                   {serveSSH, stopSSH, once(visitSSH)},
	"cmux, HTTP/1 and gRPC": {serveMux, stopMux, visitMux},
	"a loop":                {serveLoop, stopLoop, once(visitLoop)},
}

func once(visit func(addr string) error) func(string) (func() error, func()) {
	return func(addr string) (func() error, func()) { return func() error { return visit(addr) }, func() {} }
}

func runHelper() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ln, err := acceptq.ListenTCP(os.Getenv(addrEnv), acceptq.WithReusePort())
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	p := programs[os.Getenv(kindEnv)]
	if os.Getenv(controlEnv) != "" {
		p.control(ctx, ln)
		return nil
	}
	return p.serve(ctx, ln)
}

// Restarts of separate processes, in which the next one listens before the old one stops,
// lose nothing and stall nobody. The control shows that the load would be lost.
func TestRunRestarts(t *testing.T) {
	for kind := range programs {
		t.Run(kind, func(t *testing.T) {
			testkit.InNamespace(t, func(t *testing.T) {
				dialTimeout = patience // the kernel counts the clients that are stalled
				for _, control := range []string{"", "1"} {
					before := testkit.KernelCounter(t, "TCPSynRetrans")
					c, restarts := restartProcesses(t, kind, control)
					again := testkit.KernelCounter(t, "TCPSynRetrans") - before
					t.Logf("%s%s, %d restarts: %d answered, %d lost, the first: %v, %d refused, %d SYNs sent again",
						kind, strings.Repeat(", control", len(control)), restarts, c.ok.Load(), c.lost.Load(), c.failure(), c.out.Load(), again)
					switch control {
					case "":
						require.Zero(t, c.lost.Load())
						require.Zero(t, c.out.Load())
						require.Zero(t, again)
					default:
						require.NotZero(t, c.lost.Load(), "the load is too low to show the effect")
					}
				}
			})
		})
	}
}

func restartProcesses(t *testing.T, kind, control string) (*crowd, int) {
	restarts := 5
	if factor, err := strconv.Atoi(os.Getenv("ACCEPTQ_ROUNDS")); err == nil && factor > 1 {
		restarts *= factor
	}
	addr := "127.0.0.1:0"
	start := func() *exec.Cmd {
		cmd := helperCommand(t, "run", kindEnv+"="+kind, addrEnv+"="+addr, controlEnv+"="+control)
		if control != "" {
			cmd.Stderr = nil
		}
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err)
		addr = strings.TrimSpace(line)
		return cmd
	}
	end := func(cmd *exec.Cmd) {
		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		require.NoError(t, cmd.Wait())
	}
	old := start()
	known := addr
	visits := make([]func() error, 16)
	for i := range visits {
		visit, leave := programs[kind].visit(known)
		defer leave()
		visits[i] = visit
	}
	c := newCrowd(len(visits), func(id int) error { return visits[id]() })
	for range restarts {
		want := c.ok.Load() + 50
		until(t, "answers", func() bool { return c.ok.Load() >= want })
		next := start()
		end(old)
		old = next
	}
	c.end()
	end(old)
	return c, restarts
}

var selfSigned = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func serverTLS() grpc.ServerOption {
	cert := selfSigned()
	return grpc.Creds(credentials.NewServerTLSFromCert(&cert))
}

var clientTLS = credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})

func newRPC(creds func() grpc.ServerOption) *grpc.Server {
	opts := []grpc.ServerOption{grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		for {
			m := new(grpc_health_v1.HealthCheckRequest)
			if err := s.RecvMsg(m); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(m); err != nil {
				return err
			}
		}
	})}
	if creds != nil {
		opts = append(opts, creds())
	}
	srv := grpc.NewServer(opts...)
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	return srv
}

func serveRPC(creds func() grpc.ServerOption) func(context.Context, *acceptq.Listener) error {
	return func(ctx context.Context, ln *acceptq.Listener) error {
		return graceful.ServeGRPC(ctx, newRPC(creds), ln)
	}
}

func stopRPC(creds func() grpc.ServerOption) func(context.Context, *acceptq.Listener) error {
	return func(ctx context.Context, ln *acceptq.Listener) error {
		srv := newRPC(creds)
		defer context.AfterFunc(ctx, srv.GracefulStop)()
		err := srv.Serve(ln)
		srv.GracefulStop() // returns when the other call does
		return err
	}
}

func stream(ctx context.Context, c *grpc.ClientConn) error {
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/echo/Echo")
	if err != nil {
		return err
	}
	for i := range 5 {
		<-time.After(2 * time.Millisecond)
		m := &grpc_health_v1.HealthCheckRequest{Service: fmt.Sprint(i)}
		if err := s.SendMsg(m); err != nil {
			return err
		}
		if err := s.RecvMsg(m); err != nil {
			return err
		}
		if m.Service != fmt.Sprint(i) {
			return fmt.Errorf("answer %q", m.Service)
		}
	}
	return s.CloseSend()
}

// serveFast serves fasthttp.
func serveFast(ctx context.Context, ln *acceptq.Listener) error {
	srv := &fasthttp.Server{CloseOnShutdown: true, Handler: func(ctx *fasthttp.RequestCtx) { ctx.WriteString("served") }}
	return graceful.Run(ctx, ln, srv.Serve, srv.ShutdownWithContext)
}

// serveFastKept closes connections after their answer when the server stops, so that kept-alive
// clients leave before fasthttp closes idle connections.
func serveFastKept(ctx context.Context, ln *acceptq.Listener) error {
	var stopping atomic.Bool
	srv := &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) {
		if stopping.Load() {
			ctx.SetConnectionClose()
		}
		ctx.WriteString("served")
	}}
	return graceful.Run(ctx, ln, srv.Serve, srv.ShutdownWithContext,
		graceful.WithOnStop(func() { stopping.Store(true) }), graceful.WithLinger(time.Second))
}

func stopFast(ctx context.Context, ln *acceptq.Listener) error {
	srv := &fasthttp.Server{CloseOnShutdown: true, Handler: func(ctx *fasthttp.RequestCtx) { ctx.WriteString("served") }}
	down := make(chan error, 1)
	go func() {
		<-ctx.Done()
		down <- srv.Shutdown()
	}()
	return errors.Join(srv.Serve(ln), <-down)
}

// getLater sends its request some time after it has connected.
func getLater(addr string) error {
	c, err := dial(addr)
	if err != nil {
		return err
	}
	<-time.After(20 * time.Millisecond)
	return getOver(c)
}

// getKept keeps its connection as long as the server does.
func getKept(addr string) (func() error, func()) {
	tr := &http.Transport{}
	return func() error {
		req, err := http.NewRequest("POST", "http://"+addr, io.MultiReader(strings.NewReader("x")))
		if err != nil {
			return err
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && string(body) != "served" {
			err = fmt.Errorf("answer %q", body)
		}
		<-time.After(time.Millisecond)
		return err
	}, tr.CloseIdleConnections
}

func sshLoop() func(net.Listener) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	host, err := ssh.NewSignerFromKey(key)
	if err != nil {
		panic(err)
	}
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(host)
	return func(ln net.Listener) error {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer nc.Close()
				conn, channels, requests, err := ssh.NewServerConn(nc, config)
				if err != nil {
					return
				}
				go ssh.DiscardRequests(requests) // answers each
				for channel := range channels {
					channel.Reject(ssh.Prohibited, "no channels here")
				}
				conn.Wait()
			}()
		}
	}
}

func serveSSH(ctx context.Context, ln *acceptq.Listener) error {
	return graceful.Run(ctx, ln, sshLoop(), nil)
}

func stopSSH(ctx context.Context, ln *acceptq.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	return sshLoop()(ln)
}

func visitSSH(addr string) error {
	nc, err := dial(addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patience))
	conn, channels, requests, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		User: "somebody", HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: patience,
	})
	if err != nil {
		return err
	}
	c := ssh.NewClient(conn, channels, requests)
	defer c.Close()
	_, _, err = c.SendRequest("keepalive@openssh.com", true, nil)
	return err
}

// A multiplexed server serves HTTP/1 and gRPC on one port.
type multiplexed struct {
	web http.Server
	rpc *grpc.Server
}

func newMultiplexed() *multiplexed {
	return &multiplexed{http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "served")
	})}, newRPC(nil)}
}

func (m *multiplexed) serve(ln net.Listener) error {
	mux := cmux.New(ln)
	calls := mux.MatchWithWriters(cmux.HTTP2MatchHeaderFieldSendSettings("content-type", "application/grpc"))
	pages := mux.Match(cmux.HTTP1Fast())
	go m.rpc.Serve(calls)
	go m.web.Serve(pages)
	return mux.Serve()
}

func (m *multiplexed) shutdown(ctx context.Context) error {
	m.rpc.GracefulStop()
	return m.web.Shutdown(ctx)
}

func serveMux(ctx context.Context, ln *acceptq.Listener) error {
	m := newMultiplexed()
	return graceful.Run(ctx, ln, m.serve, m.shutdown)
}

func stopMux(ctx context.Context, ln *acceptq.Listener) error {
	m := newMultiplexed()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	err := m.serve(ln)
	return errors.Join(err, m.shutdown(context.Background()))
}

func visitMux(addr string) (func() error, func()) {
	calls := call(insecure.NewCredentials(), unary)
	n := 0
	return func() error {
		if n++; n%2 == 0 {
			return calls(addr)
		}
		return getLater(addr)
	}, func() {}
}

// loop is an accept loop of 15 lines.
func loop(ln net.Listener) error {
	for {
		nc, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer nc.Close()
			line, err := bufio.NewReader(nc).ReadString('\n')
			if err == nil {
				io.WriteString(nc, line)
			}
		}()
	}
}

func serveLoop(ctx context.Context, ln *acceptq.Listener) error {
	return graceful.Run(ctx, ln, loop, nil)
}

func stopLoop(ctx context.Context, ln *acceptq.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	return loop(ln)
}

func visitLoop(addr string) error {
	nc, err := dial(addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patience))
	<-time.After(5 * time.Millisecond)
	if _, err := io.WriteString(nc, "hello\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(nc)
	if err == nil && string(answer) != "hello\n" {
		err = fmt.Errorf("answer %q", answer)
	}
	return err
}
