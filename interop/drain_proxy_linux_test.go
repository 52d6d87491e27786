package interop

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/acceptq/acceptq"
)

// A proxy is a program that stands before servers.
type proxy struct {
	args   []string
	config string // {server} and {front} are addresses, {dir} is a folder
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
	option httpclose
	timeout connect 10s
	timeout client 20s
	timeout server 20s
frontend front
	bind {front}
	default_backend back
backend back
	http-reuse never
	server one {server}
`}

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
	server {
		listen {front};
		location / {
			proxy_pass http://{server};
			proxy_next_upstream off;
			proxy_connect_timeout 10s;
		}
	}
}
`}

// Behind a proxy each server begins to listen beside the one that it follows
// (SO_REUSEPORT), which then stops by the recipe: no request fails.
func TestDrainBehindHAProxy(t *testing.T) {
	behind(t, need(t, "haproxy", "haproxy"), haproxy)
}

func TestDrainBehindNginx(t *testing.T) {
	behind(t, need(t, "nginx", "nginx-light"), nginx)
}

func behind(t *testing.T, program string, p proxy) {
	inEachWay(t, func(t *testing.T) {
		without := restartBehind(t, program, p, false)
		t.Logf("Shutdown: %d answered, %d failed, the first: %v", without.ok.Load(), without.lost.Load(), without.failure())
		with := restartBehind(t, program, p, true)
		t.Logf("the recipe: %d answered, %d failed, the first: %v", with.ok.Load(), with.lost.Load(), with.failure())
		if without.lost.Load() == 0 {
			t.Error("Shutdown alone lost nobody: the test has no load, or Drain no purpose")
		}
		if with.lost.Load() != 0 {
			t.Error("the recipe loses some")
		}
	})
}

func restartBehind(t *testing.T, program string, p proxy, drain bool) *crowd {
	const restarts = 15
	now := newServer(t, "127.0.0.1:0")
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
	text := strings.NewReplacer("{front}", front, "{dir}", dir, "{server}", addr).Replace(p.config)
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
		next := newServer(t, addr)
		now.stop(t, drain)
		now = next
	}
	clients.end()
	now.stop(t, drain)
	return clients
}

type httpServer struct {
	ln       *acceptq.Listener
	srv      http.Server
	early    sync.Map // connections that have had no answer yet
	answered atomic.Int64
	served   chan error
}

func newServer(t *testing.T, addr string) *httpServer {
	ln, err := acceptq.ListenTCP(addr, acceptq.WithReusePort())
	if err != nil {
		t.Fatal(err)
	}
	s := &httpServer{ln: ln, served: make(chan error, 1)}
	s.srv.ConnState = func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.early.Store(c, nil)
		case http.StateIdle, http.StateHijacked, http.StateClosed:
			s.early.Delete(c)
		}
	}
	s.srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "served")
		s.answered.Add(1)
	})
	go func() { s.served <- s.srv.Serve(ln) }()
	return s
}

func (s *httpServer) stop(t *testing.T, drain bool) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if drain {
		if err := s.ln.Drain(ctx); err != nil {
			t.Error(err)
		}
		until(t, "the first answers", func() bool {
			none := true
			s.early.Range(func(any, any) bool { none = false; return false })
			return none
		})
	}
	if err := s.srv.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}
