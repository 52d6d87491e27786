package interop

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/graceful"
)

// A proxy is a program that stands before servers.
type proxy struct {
	args   []string
	config string // {server} and {front} are addresses, {dir} is a folder, {upstream} that of an upstream
}

// An upstream is how a proxy speaks to the servers.
type upstream struct {
	name, config string
	tls          bool
}

// HAProxy tries nothing twice here. With tcp-smart-connect it holds the final ACK
// back until it has a request to send with it.
var haproxy = proxy{args: []string{"-db", "-f"}, config: `
global
	nbthread 1
defaults
	mode http
	retries 0
	option tcp-smart-connect
	timeout connect 10s
	timeout client 20s
	timeout server 20s
frontend front
	bind {front}
	default_backend back
backend back
	{upstream}
`}

var behindHAProxy = []upstream{
	{"new connections", "option httpclose\n\thttp-reuse never\n\tserver one {server}", false},
	{"kept-alive connections", "http-reuse always\n\tserver one {server}", false},
	{"kept-alive connections with TLS", "http-reuse always\n\tserver one {server} ssl verify none alpn http/1.1", true},
	// Each request has a connection of its own: net/http ends one with a GOAWAY that
	// refuses streams on their way, and HAProxy may not repeat them here.
	{"HTTP/2 with TLS", "http-reuse never\n\tserver one {server} ssl verify none alpn h2", true},
	{"h2c", "http-reuse never\n\tserver one {server} proto h2", false},
}

// nginx tries nothing twice either.
var nginx = proxy{args: []string{"-c"}, config: `
daemon off;
master_process off;
pid {dir}/pid;
error_log stderr crit;
events { worker_connections 1024; }
http {
	access_log off;
	client_body_temp_path {dir}/body;
	proxy_temp_path {dir}/proxy;
	fastcgi_temp_path {dir}/fastcgi;
	uwsgi_temp_path {dir}/uwsgi;
	scgi_temp_path {dir}/scgi;
	upstream servers {
		server {server} max_fails=0;
		keepalive 32;
	}
	server {
		listen {front};
		location / {
			proxy_next_upstream off;
			proxy_connect_timeout 10s;
			{upstream}
		}
	}
}
`}

var behindNginx = []upstream{
	{"new connections", `proxy_pass http://{server};`, false},
	{"kept-alive connections", `proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection "";`, false},
	{"kept-alive connections with TLS", `proxy_pass https://servers; proxy_http_version 1.1; proxy_set_header Connection "";`, true},
}

// Behind a proxy each server begins to listen beside the one that it follows
// (SO_REUSEPORT), which then stops with package graceful: no request fails. With
// Shutdown alone some do.
func TestDrainBehindHAProxy(t *testing.T) {
	behind(t, need(t, "haproxy", "haproxy"), haproxy, behindHAProxy)
}

func TestDrainBehindNginx(t *testing.T) {
	behind(t, need(t, "nginx", "nginx-light"), nginx, behindNginx)
}

func behind(t *testing.T, program string, p proxy, upstreams []upstream) {
	inEachWay(t, func(t *testing.T) {
		if os.Getenv(unprivilegedEnv) != "" {
			upstreams = upstreams[:1] // the way to keep clients out is the same for all
		}
		for _, u := range upstreams {
			t.Run(u.name, func(t *testing.T) {
				without := restartBehind(t, program, p, u, false)
				t.Logf("Shutdown: %d answered, %d failed, the first: %v", without.ok.Load(), without.lost.Load(), without.failure())
				with := restartBehind(t, program, p, u, true)
				t.Logf("graceful: %d answered, %d failed, the first: %v", with.ok.Load(), with.lost.Load(), with.failure())
				if without.lost.Load() == 0 {
					t.Error("Shutdown alone lost nobody: the test has no load, or graceful no purpose")
				}
				if with.lost.Load() != 0 {
					t.Error("graceful loses some")
				}
			})
		}
	})
}

func restartBehind(t *testing.T, program string, p proxy, u upstream, stop bool) *crowd {
	restarts := 20
	if !stop {
		restarts = 5 // are enough to lose some
	}
	now := newServer(t, "127.0.0.1:0", u, stop)
	addr := now.ln.Addr().String()

	// The proxy listens on a port that was free a moment ago.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	front := free.Addr().String()
	free.Close()
	dir := t.TempDir()
	config := filepath.Join(dir, "config")
	text := strings.ReplaceAll(p.config, "{upstream}", u.config)
	text = strings.NewReplacer("{front}", front, "{dir}", dir, "{server}", addr).Replace(text)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, append(p.args, config)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	until(t, "the proxy", func() bool { return get(front) == nil })

	clients := newCrowd(32, func(int) error { return get(front) })
	for range restarts {
		until(t, "answers", func() bool { return now.answered.Load() >= 20 })
		next := newServer(t, addr, u, stop)
		now.stop(t)
		now = next
	}
	clients.end()
	now.stop(t)
	return clients
}

type httpServer struct {
	ln       *acceptq.Listener
	srv      http.Server
	answered atomic.Int64
	term     context.CancelFunc
	served   chan error
}

// newServer is a server that stops with package graceful, or with Shutdown alone.
func newServer(t *testing.T, addr string, u upstream, stop bool) *httpServer {
	ln, err := acceptq.ListenTCP(addr, acceptq.WithReusePort())
	if err != nil {
		t.Fatal(err)
	}
	s := &httpServer{ln: ln, served: make(chan error, 1)}
	s.srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "served")
		s.answered.Add(1)
	})
	s.srv.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.srv.Protocols = new(http.Protocols)
	s.srv.Protocols.SetHTTP1(true)
	s.srv.Protocols.SetHTTP2(true)
	s.srv.Protocols.SetUnencryptedHTTP2(true)
	if u.tls {
		cert, _ := certificate(t)
		s.srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	ctx, term := context.WithCancel(context.Background())
	s.term = term
	go func() {
		switch {
		case stop && u.tls:
			s.served <- graceful.ServeTLS(ctx, &s.srv, ln, "", "")
		case stop:
			s.served <- graceful.Serve(ctx, &s.srv, ln)
		default:
			if u.tls {
				go s.srv.ServeTLS(ln, "", "")
			} else {
				go s.srv.Serve(ln)
			}
			<-ctx.Done()
			s.served <- s.srv.Shutdown(context.Background())
		}
	}()
	return s
}

func (s *httpServer) stop(t *testing.T) {
	s.term()
	if err := <-s.served; err != nil {
		t.Error(err)
	}
}
