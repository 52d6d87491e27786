package acceptq

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// unprivilegedEnv is set in a test that runs without CAP_NET_ADMIN.
const unprivilegedEnv = "ACCEPTQ_TEST_UNPRIVILEGED"

// inNamespaceUnprivileged runs f in a new namespace, in a process that cannot regain
// CAP_NET_ADMIN. A program that root starts gets the capabilities in the bounding set
// of the starting thread. So the function removes the capability from that set and
// starts the test binary again.
func inNamespaceUnprivileged(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(unprivilegedEnv) != "" {
		f(t)
		return
	}
	inNamespace(t, func(t *testing.T) {
		self, err := os.Executable()
		require.NoError(t, err)
		cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=50s")
		cmd.Env = append(os.Environ(), unprivilegedEnv+"=1")
		type result struct {
			out []byte
			err error
		}
		done := make(chan result)
		go func() {
			runtime.LockOSThread() // never unlocked, because the thread has lost a capability
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0); err != nil {
				done <- result{err: err}
				return
			}
			out, err := cmd.CombinedOutput()
			done <- result{out, err}
		}()
		r := <-done
		t.Logf("without CAP_NET_ADMIN:\n%s", r.out)
		require.NoError(t, r.err)
		require.Contains(t, string(r.out), "--- PASS: "+t.Name())
	})
}

// restarts is one run: servers replace each other on one port under the load of a crowd.
type restarts struct {
	network, addr string
	dial          []string // the hosts that clients dial
	n             int
	slow          bool // requests take longer than a drain
	kernel        kernel
	drain         bool // stop as documented; otherwise only Shutdown
	checkStop     func(t *testing.T, ln *Listener)
}

func (r restarts) run(t *testing.T) *crowd {
	t.Helper()
	var clients *crowd
	defer func() {
		if clients != nil {
			clients.end()
		}
	}()
	addr := r.addr
	began := time.Now()
	for i := range r.n {
		ln, err := r.kernel.listenWith(t.Context(), r.network, addr, nil)
		require.NoError(t, err)
		addr = ln.Addr().String()
		var answered atomic.Int64
		busy := make(chan struct{})
		early := unanswered{conns: make(map[net.Conn]struct{})}
		srv := &http.Server{ConnState: early.note, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if r.slow {
				<-time.After(60 * time.Millisecond)
			}
			io.WriteString(w, "served")
			if answered.Add(1) == 30 {
				close(busy)
			}
		})}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		if clients == nil {
			_, port, err := net.SplitHostPort(addr)
			require.NoError(t, err)
			var targets []string
			for _, host := range r.dial {
				targets = append(targets, net.JoinHostPort(host, port))
			}
			clients = newCrowd(64, targets...)
		}
		select {
		case <-busy:
		case <-time.After(20 * time.Second):
			t.Error("the server has answered too few requests")
		}
		if i == r.n-1 {
			clients.end()
		}

		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if r.drain {
			if err := ln.Drain(ctx); err != nil {
				t.Error(err)
			}
			if r.checkStop != nil {
				r.checkStop(t, ln)
			}
			for !early.none() && ctx.Err() == nil {
				<-time.After(time.Millisecond)
			}
		}
		if err := srv.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}
	c := clients
	clients = nil
	t.Logf("%d restarts in %v: %d answered, %d lost, the first: %v",
		r.n, time.Since(began).Round(time.Millisecond), c.ok.Load(), c.lost.Load(), c.firstFailure)
	return c
}

// These rows must pass with every way to keep new clients out. The handshakes of the
// clients take up to 30 ms.
func testDrainLosesNobody(t *testing.T, k kernel, v4, v6 way) {
	blind := k
	blind.diag = listing() // sees only the queue

	t.Run("control: Shutdown alone", func(t *testing.T) {
		c := restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: 40, kernel: k}.run(t)
		require.Greater(t, c.lost.Load(), int64(100))
	})
	t.Run("control: a drain that reads only the queue", func(t *testing.T) {
		c := restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: 40, kernel: blind, drain: true}.run(t)
		require.Greater(t, c.lost.Load(), int64(40))
	})
	for _, row := range []struct {
		name     string
		restarts restarts
	}{
		{"IPv4", restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: 40}},
		{"slow requests", restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: 8, slow: true}},
		{"IPv6", restarts{network: "tcp6", addr: "[::1]:0", dial: []string{"::1"}, n: 10}},
		{"dual-stack", restarts{network: "tcp", addr: ":0", dial: []string{"127.0.0.1", "::1"}, n: 10}},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := v4
			if row.restarts.network != "tcp4" {
				haveIPv6(t)
				want = v6
			}
			r := row.restarts
			r.kernel, r.drain = k, true
			r.checkStop = func(t *testing.T, ln *Listener) {
				if w := wayOf(t, ln.intake.raw); w != want {
					t.Errorf("clients were kept out by %+v, want %+v", w, want)
				}
			}
			c := r.run(t)
			require.Zero(t, c.lost.Load(), c.firstFailure)
			require.GreaterOrEqual(t, c.ok.Load(), int64(30*r.n))
		})
	}
}

func TestDrainLosesNobody(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		testDrainLosesNobody(t, realKernel, way{len(dropSYN), 0, -1}, way{len(dropSYN), 0, 0})
	})
}

func TestDrainLosesNobodyUnprivileged(t *testing.T) {
	t.Parallel()
	inNamespaceUnprivileged(t, func(t *testing.T) {
		status, err := os.ReadFile("/proc/self/status")
		require.NoError(t, err)
		for line := range strings.Lines(string(status)) {
			if caps, ok := strings.CutPrefix(line, "CapEff:"); ok {
				var set uint64
				_, err := fmt.Sscanf(caps, "%x", &set)
				require.NoError(t, err)
				require.Zero(t, set&(1<<unix.CAP_NET_ADMIN), "still privileged")
			}
		}
		k := realKernel
		if filterPermitted(t) {
			t.Log("this kernel is older than mid-2026 and lets any user set a filter: the test refuses it instead")
			k.attachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
		}
		testDrainLosesNobody(t, k, way{0, 255, -1}, way{0, 255, 255})
	})
}

// filterPermitted reports whether this process can set a filter on a new socket.
func filterPermitted(t *testing.T) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	err = realKernel.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]})
	if err != nil {
		require.ErrorIs(t, err, unix.EPERM)
	}
	return err == nil
}
