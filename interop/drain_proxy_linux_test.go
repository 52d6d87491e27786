package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/acceptq/acceptq"
)

// HAProxy tries nothing twice here. With tcp-smart-connect it holds the final ACK
// back until it has a request to send with it.
const haproxyConfig = `
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
	bind fd@3
	default_backend back
backend back
	http-reuse never
	server one %s
`

// Behind a proxy each server begins to listen beside the one that it follows
// (SO_REUSEPORT), which then stops by the recipe: no request fails.
func TestDrainBehindHAProxy(t *testing.T) {
	haproxy := need(t, "haproxy", "haproxy")
	inEachWay(t, func(t *testing.T) {
		without := behindHAProxy(t, haproxy, false)
		t.Logf("Shutdown: %d answered, %d failed, the first: %v", without.ok.Load(), without.lost.Load(), without.failure())
		with := behindHAProxy(t, haproxy, true)
		t.Logf("the recipe: %d answered, %d failed, the first: %v", with.ok.Load(), with.lost.Load(), with.failure())
		if without.lost.Load() == 0 {
			t.Error("Shutdown alone lost nobody: the test has no load, or Drain no purpose")
		}
		if with.lost.Load() != 0 {
			t.Error("the recipe loses some")
		}
	})
}

func behindHAProxy(t *testing.T, haproxy string, drain bool) *crowd {
	const restarts = 20
	now := newServer(t, "127.0.0.1:0")
	addr := now.ln.Addr().String()

	front, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	f, err := front.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	config := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(config, fmt.Appendf(nil, haproxyConfig, addr), 0o600); err != nil {
		t.Fatal(err)
	}
	proxy := exec.Command(haproxy, "-db", "-f", config)
	proxy.ExtraFiles = []*os.File{f}
	if err := proxy.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		proxy.Process.Kill()
		proxy.Wait()
	}()

	clients := newCrowd(32, func(int) error { return get(front.Addr().String()) })
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
