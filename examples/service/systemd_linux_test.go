package main

import (
	"bufio"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

// systemd accepts both units.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("no systemd-analyze on PATH: apt-get install systemd")
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"service.socket", "service.service"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Skip(err)
		}
		text = []byte(strings.Replace(string(text), "/usr/local/bin/service", "/bin/true", 1)) // it must exist
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	cmd := exec.CommandContext(t.Context(), analyze, "verify", "--recursive-errors=no", filepath.Join(dir, "service.service"), filepath.Join(dir, "service.socket"))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), dir, "a warning")
}

// Restarts with a socket that systemd holds lose nothing. The test takes the part of
// systemd: it listens with a short queue, passes the socket, waits for READY=1, and starts
// the next process when the old one has ended.
func TestSocketActivation(t *testing.T) {
	held, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(16))
	require.NoError(t, err)
	defer held.Close()
	addr := held.Addr().String()
	file, err := held.File()
	require.NoError(t, err)
	defer file.Close()
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	require.NoError(t, err)
	defer ready.Close()
	start := func() *service {
		program := try.Program(t, "-metrics", "127.0.0.1:0")
		// systemd sets LISTEN_PID between fork and exec; exec alone keeps the process id.
		cmd := exec.CommandContext(t.Context(), "/bin/sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`}, program.Args...)...)
		cmd.Env = append(program.Env, "NOTIFY_SOCKET="+ready.LocalAddr().String())
		cmd.ExtraFiles = []*os.File{file}
		s := begin(t, cmd)
		require.Equal(t, addr, s.addr)
		require.NoError(t, ready.SetReadDeadline(time.Now().Add(patience)))
		state := make([]byte, 100)
		n, err := ready.Read(state)
		require.NoError(t, err)
		require.Equal(t, "READY=1", string(state[:n]))
		return s
	}
	s := start()
	stats, err := held.Stats()
	require.NoError(t, err)
	require.Greater(t, stats.Limit, 16, "the service has made the queue longer")

	var served atomic.Int64
	var failed atomic.Pointer[error]
	over := make(chan struct{})
	var clients sync.WaitGroup
	for range 32 {
		clients.Go(func() {
			tr := &http.Transport{DisableKeepAlives: true}
			for {
				select {
				case <-over:
					return
				default:
				}
				req, _ := http.NewRequest("GET", "http://"+addr, nil)
				resp, err := tr.RoundTrip(req)
				if err != nil {
					failed.Store(&err)
					return
				}
				resp.Body.Close()
				served.Add(1)
			}
		})
	}
	for range 3 {
		want := served.Load() + 200
		require.Eventually(t, func() bool { return served.Load() > want || failed.Load() != nil }, patience, time.Millisecond)
		s.end(t)
		s = start()
	}
	close(over)
	clients.Wait()
	if err := failed.Load(); err != nil {
		require.NoError(t, *err)
	}
	s.end(t)
}

// The program runs below systemd-socket-activate, with the port and the arguments of the
// units.
func TestSystemdSocketActivate(t *testing.T) {
	activate, err := exec.LookPath("systemd-socket-activate")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("no systemd-socket-activate on PATH: apt-get install systemd")
		}
		t.Skip(err)
	}
	require.Equal(t, "8080", find(t, "service.socket", `^ListenStream=(.*)$`))
	arg := strings.Fields(find(t, "service.service", `^ExecStart=\S+ (.*)$`))
	require.Equal(t, "-metrics", arg[0])
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := free.Addr().String()
	free.Close()
	program := try.Program(t, "-metrics", "127.0.0.1:0")
	args := []string{"-l", addr}
	for _, v := range program.Env {
		if strings.HasPrefix(v, "ACCEPTQ_TEST") || strings.HasPrefix(v, "GORACE") {
			args = append(args, "-E", v)
		}
	}
	cmd := exec.CommandContext(t.Context(), activate, append(args, program.Args...)...)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	// The first client starts the service.
	require.Eventually(t, func() bool {
		resp, err := http.Get("http://" + addr)
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	}, patience, 10*time.Millisecond)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Contains(t, line, addr)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait())
}
