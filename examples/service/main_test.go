package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/examples/internal/try"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	try.Be(main)
	os.Exit(m.Run())
}

const patience = 20 * time.Second

// A service is a running program.
type service struct {
	*exec.Cmd
	addr, metrics, backlog string
}

// begin starts the program and returns when it listens.
func begin(t *testing.T, cmd *exec.Cmd) *service {
	t.Helper()
	s := &service{Cmd: cmd}
	var log strings.Builder
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	if err := cmd.Start(); err != nil {
		t.Skipf("this system cannot start a program: %v", err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "%s", &log)
	words := strings.Fields(line)
	require.Greater(t, len(words), 6, line)
	s.addr, s.metrics, s.backlog = words[2], words[4], strings.Join(words[6:], " ")
	return s
}

// end sends SIGTERM. An ordinary stop ends with status 0.
func (s *service) end(t *testing.T) {
	t.Helper()
	require.NoError(t, s.Process.Signal(syscall.SIGTERM))
	require.NoError(t, s.Wait(), "%v", s.Stderr)
}

func status(t *testing.T, url string) (code int, body string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	require.NoError(t, err)
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(text)
}

func needOverlap(t *testing.T) {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort())
	if err != nil {
		t.Skip(err)
	}
	ln.Close()
}

// find returns what an expression finds in a file beside the program.
func find(t *testing.T, file, expr string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Skip(err)
	}
	m := regexp.MustCompile(`(?m)` + expr).FindStringSubmatch(string(text))
	require.NotNil(t, m, "%s has no %s", file, expr)
	return m[1]
}

// The program runs with the arguments of the manifest as the manifest expects it.
func TestKubernetes(t *testing.T) {
	needOverlap(t)
	const file = "kubernetes.yaml"
	args := regexp.MustCompile(`"([^"]*)"`).FindAllStringSubmatch(find(t, file, `args: \[(.*)\]`), -1)
	require.NotEmpty(t, args)
	values := map[string]string{}
	for _, arg := range args {
		name, value, ok := strings.Cut(strings.TrimPrefix(arg[1], "-"), "=")
		require.True(t, ok, arg[1])
		values[name] = value
	}
	require.Equal(t, ":"+find(t, file, `name: http, containerPort: (\d+)`), values["addr"])
	require.Equal(t, ":"+find(t, file, `name: metrics, containerPort: (\d+)`), values["metrics"])
	require.Equal(t, "metrics", find(t, file, `httpGet: \{path: /ready, port: (\w+)\}`))
	timeout, err := time.ParseDuration(values["timeout"])
	require.NoError(t, err)
	grace, err := strconv.Atoi(find(t, file, `terminationGracePeriodSeconds: (\d+)`))
	require.NoError(t, err)
	require.Greater(t, time.Duration(grace)*time.Second, timeout)

	values["addr"], values["metrics"], values["delay"] = "127.0.0.1:0", "127.0.0.1:0", "1s" // other ports, and less time
	arguments := func(addr string) (all []string) {
		values["addr"] = addr
		for name, value := range values {
			all = append(all, "-"+name+"="+value)
		}
		return all
	}
	old := begin(t, try.Program(t, arguments("127.0.0.1:0")...))
	ready := "http://" + old.metrics + "/ready"
	code, _ := status(t, ready)
	require.Equal(t, http.StatusOK, code)
	_, vars := status(t, "http://"+old.metrics+"/debug/vars")
	require.Contains(t, vars, "acceptQueue")
	next := begin(t, try.Program(t, arguments(old.addr)...)) // the overlap
	require.NoError(t, old.Process.Signal(syscall.SIGTERM))
	require.Eventually(t, func() bool { code, _ := status(t, ready); return code == http.StatusServiceUnavailable }, patience, time.Millisecond)
	for range 20 { // served during the delay and after it
		code, body := status(t, "http://"+old.addr)
		require.Equal(t, http.StatusOK, code)
		require.Equal(t, "hello\n", body)
	}
	require.NoError(t, old.Wait(), "%v", old.Stderr)
	_, body := status(t, "http://"+old.addr)
	require.Equal(t, "hello\n", body)
	next.end(t)
}

// The first deploy: the old process does not have WithReusePort yet.
func TestFirstDeploy(t *testing.T) {
	needOverlap(t)
	old, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer old.Close()
	try.Fails(t, try.Program(t, "-addr", old.Addr().String(), "-metrics", "127.0.0.1:0"), 1, "service", "in use")
}

func TestWrongUse(t *testing.T) {
	try.Misused(t, "service", `":8080"`, ":8080")
	try.Fails(t, try.Program(t, "-addr", "nowhere"), 1, "service", "nowhere")
	try.Fails(t, try.Program(t, "-addr", "127.0.0.1:0", "-metrics", "127.0.0.1:0", "-delay", "30s"), 1, "service", "raise WithTimeout")
}
