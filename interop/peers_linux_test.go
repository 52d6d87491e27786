package interop

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/cloudwego/hertz/pkg/app"
	"github.com/cloudwego/hertz/pkg/app/server"
	"github.com/cloudwego/hertz/pkg/common/hlog"
	"github.com/cloudwego/hertz/pkg/network/standard"
	"github.com/cloudwego/netpoll"
	"github.com/gin-gonic/gin"
	"github.com/gofiber/fiber/v3"
	"github.com/labstack/echo/v5"
	"github.com/pires/go-proxyproto"
	"github.com/soheilhy/cmux"
	"github.com/stretchr/testify/require"
	"github.com/valyala/fasthttp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// A peer is a server that serves the clients of a listener.
type peer struct {
	serve func() error
	stop  func() // makes serve return
	ask   func(addr string) error
}

// serveBy lets clients wait in the queue of a listener, passes the listener to a peer,
// and drains it. The drain must work with the peer: all clients get an answer, and a
// later client is kept out. Then the peer stops, and the listener is closed.
func serveBy(t *testing.T, newPeer func(ln *acceptq.Listener) peer) {
	t.Helper()
	ln, p, results := serveQueue(t, newPeer)
	served := make(chan error, 1)
	go func() { served <- p.serve() }()
	require.NoError(t, ln.Drain(within(t, patience)))
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Zero(t, s.Queued)
	for range waiting {
		require.NoError(t, <-results)
	}
	_, err = dial(ln.Addr().String())
	require.ErrorIs(t, err, errNotIn, "the drain must keep new clients out")
	p.stop()
	<-served // the test does not check the error of the peer
	ln.Close()
	_, err = ln.Stats()
	require.ErrorIs(t, err, net.ErrClosed)
}

// serveUndrained is serveBy for a peer that accepts on its own descriptor, which Drain
// does not know. A later client is served too.
func serveUndrained(t *testing.T, newPeer func(ln *acceptq.Listener) peer) {
	t.Helper()
	ln, p, results := serveQueue(t, newPeer)
	served := make(chan error, 1)
	go func() { served <- p.serve() }()
	for range waiting {
		require.NoError(t, <-results)
	}
	require.NoError(t, p.ask(ln.Addr().String()))
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Zero(t, s.Queued)
	require.Equal(t, limit, s.Limit)
	// After File the socket counts as shared, so a drain leaves it open for the other
	// descriptor.
	require.NoError(t, drainShared(within(t, patience), ln))
	require.NoError(t, p.ask(ln.Addr().String()))
	p.stop()
	<-served
}

const (
	waiting = 16
	limit   = 32
)

func serveQueue(t *testing.T, newPeer func(ln *acceptq.Listener) peer) (*acceptq.Listener, peer, <-chan error) {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(limit))
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	p := newPeer(ln)
	results := make(chan error, waiting)
	for range waiting {
		go func() { results <- p.ask(ln.Addr().String()) }()
	}
	require.Eventually(t, func() bool {
		s, err := ln.Stats()
		return err == nil && s.Queued == waiting && s.Limit == limit
	}, patience, time.Millisecond)
	return ln, p, results
}

// requireHidden requires that the listener of a peer does not give access to the queue
// of the listener that it wraps.
func requireHidden(t *testing.T, wrapper net.Listener) {
	t.Helper()
	_, err := acceptq.Wrap(wrapper)
	require.ErrorIs(t, err, syscall.EINVAL)
	_, shows := wrapper.(syscall.Conn)
	require.False(t, shows)
}

var hello = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") })

func TestNetHTTP(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		srv := &http.Server{Handler: hello}
		return peer{
			func() error { return srv.Serve(ln) },
			func() { srv.Shutdown(within(t, patience)) },
			get,
		}
	})
}

func TestNetHTTPOverTLS(t *testing.T) {
	cert, roots := certificate(t)
	serveBy(t, func(ln *acceptq.Listener) peer {
		srv := &http.Server{Handler: hello, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}
		requireHidden(t, tls.NewListener(ln, srv.TLSConfig))
		return peer{
			func() error { return srv.ServeTLS(ln, "", "") },
			func() { srv.Shutdown(within(t, patience)) },
			func(addr string) error {
				transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
				defer transport.CloseIdleConnections()
				resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + addr)
				if err != nil {
					return err
				}
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				if err == nil && (resp.ProtoMajor != 2 || string(body) != "served") {
					err = fmt.Errorf("%s, %q", resp.Proto, body)
				}
				return err
			},
		}
	})
}

func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter:     time.Now().Add(time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

func TestGRPC(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		srv := grpc.NewServer()
		healthpb.RegisterHealthServer(srv, health.NewServer())
		return peer{
			func() error { return srv.Serve(ln) },
			srv.GracefulStop,
			func(addr string) error { return callHealth(t.Context(), addr) },
		}
	})
}

func TestFasthttp(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		srv := &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) { ctx.WriteString("served") }}
		return peer{
			func() error { return srv.Serve(ln) },
			func() { srv.Shutdown() },
			get,
		}
	})
}

func TestFiber(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		app := fiber.New()
		app.Get("/", func(c fiber.Ctx) error { return c.SendString("served") })
		return peer{
			func() error { return app.Listener(ln, fiber.ListenConfig{DisableStartupMessage: true}) },
			func() { app.Shutdown() },
			get,
		}
	})
}

func TestGin(t *testing.T) {
	gin.SetMode(gin.ReleaseMode)
	serveBy(t, func(ln *acceptq.Listener) peer {
		engine := gin.New()
		engine.GET("/", func(c *gin.Context) { c.String(http.StatusOK, "served") })
		return peer{
			func() error { return engine.RunListener(ln) },
			func() { ln.Close() },
			get,
		}
	})
}

func TestEcho(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		e := echo.New()
		e.Logger = slog.New(slog.DiscardHandler)
		e.GET("/", func(c *echo.Context) error { return c.String(http.StatusOK, "served") })
		ctx, stop := context.WithCancel(t.Context())
		return peer{
			func() error { return echo.StartConfig{Listener: ln}.Start(ctx, e) },
			stop,
			get,
		}
	})
}

func TestCmux(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		mux := cmux.New(ln)
		calls := mux.MatchWithWriters(cmux.HTTP2MatchHeaderFieldSendSettings("content-type", "application/grpc"))
		pages := mux.Match(cmux.HTTP1Fast())
		requireHidden(t, calls)
		requireHidden(t, pages)
		rpc, web := grpc.NewServer(), &http.Server{Handler: hello}
		healthpb.RegisterHealthServer(rpc, health.NewServer())
		go rpc.Serve(calls)
		go web.Serve(pages)
		var clients atomic.Int64
		return peer{
			mux.Serve,
			func() {
				ln.Close() // mux.Close does not close it
				rpc.Stop()
				web.Close()
			},
			func(addr string) error { // a web page and a call alternately
				if clients.Add(1)%2 == 0 {
					return get(addr)
				}
				return callHealth(t.Context(), addr)
			},
		}
	})
}

func TestProxyProto(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		proxied := &proxyproto.Listener{Listener: ln}
		requireHidden(t, proxied)
		client := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 4711} // as the proxy says
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.RemoteAddr == client.String() {
				io.WriteString(w, "served")
			}
		})}
		return peer{
			func() error { return srv.Serve(proxied) },
			func() { srv.Shutdown(within(t, patience)) },
			func(addr string) error {
				c, err := net.DialTimeout("tcp", addr, patience)
				if err != nil {
					return err
				}
				header := proxyproto.HeaderProxyFromAddrs(2, client, c.RemoteAddr())
				if _, err := header.WriteTo(c); err != nil {
					return err
				}
				return getOver(c)
			},
		}
	})
}

func TestLimitListener(t *testing.T) {
	serveBy(t, func(ln *acceptq.Listener) peer {
		few := netutil.LimitListener(ln, 2)
		requireHidden(t, few)
		srv := &http.Server{Handler: hello}
		return peer{
			func() error { return srv.Serve(few) },
			func() { srv.Shutdown(within(t, patience)) },
			get,
		}
	})
}

func TestSSH(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	host, err := ssh.NewSignerFromKey(key)
	require.NoError(t, err)
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(host)
	serveBy(t, func(ln *acceptq.Listener) peer {
		var sessions sync.WaitGroup
		return peer{
			func() error {
				defer sessions.Wait()
				for {
					c, err := ln.Accept()
					if err != nil {
						return err
					}
					sessions.Go(func() {
						defer c.Close()
						conn, channels, requests, err := ssh.NewServerConn(c, config)
						if err != nil {
							return
						}
						go ssh.DiscardRequests(requests) // answers each
						for channel := range channels {
							channel.Reject(ssh.Prohibited, "no channels here")
						}
						conn.Wait()
					})
				}
			},
			func() { ln.Close() },
			func(addr string) error {
				c, err := ssh.Dial("tcp", addr, &ssh.ClientConfig{
					User: "somebody", HostKeyCallback: ssh.FixedHostKey(host.PublicKey()), Timeout: patience,
				})
				if err != nil {
					return err
				}
				defer c.Close()
				_, _, err = c.SendRequest("keepalive@openssh.com", true, nil)
				return err
			},
		}
	})
}

// netpoll accepts its own listener type or that of net, and accepts connections on a
// copy of the descriptor. The call of File marks the socket as shared.
func TestNetpoll(t *testing.T) {
	serveUndrained(t, func(ln *acceptq.Listener) peer {
		_, err := netpoll.ConvertListener(ln)
		require.Error(t, err, "netpoll now accepts an acceptq.Listener: pass it directly")
		loop, err := netpoll.NewEventLoop(func(_ context.Context, c netpoll.Connection) error {
			line, err := c.Reader().Slice(len("hello\n"))
			if err != nil {
				return err
			}
			defer line.Release()
			if _, err := c.Writer().WriteString("served"); err != nil {
				return err
			}
			if err := c.Writer().Flush(); err != nil {
				return err
			}
			return c.Close()
		})
		require.NoError(t, err)
		f, err := ln.File()
		require.NoError(t, err)
		f.Close()
		return peer{
			func() error { return loop.Serve(ln.TCPListener()) },
			func() { loop.Shutdown(within(t, patience)) },
			func(addr string) error {
				c, err := net.DialTimeout("tcp", addr, patience)
				if err != nil {
					return err
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				if _, err := io.WriteString(c, "hello\n"); err != nil {
					return err
				}
				answer, err := io.ReadAll(c)
				if err == nil && string(answer) != "served" {
					err = fmt.Errorf("answer %q", answer)
				}
				return err
			},
		}
	})
}

func TestHertzOverNetpoll(t *testing.T) {
	hlog.SetOutput(io.Discard)
	serveUndrained(t, func(ln *acceptq.Listener) peer {
		f, err := ln.File()
		require.NoError(t, err)
		f.Close()
		h := server.New(server.WithListener(ln.TCPListener()))
		return hertz(t, h)
	})
}

func TestHertzOverNet(t *testing.T) {
	hlog.SetOutput(io.Discard)
	serveBy(t, func(ln *acceptq.Listener) peer {
		h := server.New(server.WithListener(ln), server.WithTransport(standard.NewTransporter))
		return hertz(t, h)
	})
}

func hertz(t *testing.T, h *server.Hertz) peer {
	h.GET("/", func(_ context.Context, c *app.RequestContext) { c.WriteString("served") })
	return peer{
		h.Run,
		func() { h.Shutdown(within(t, patience)) },
		get,
	}
}
