package acceptqprom

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/acceptq/acceptq/observe"
	"github.com/stretchr/testify/require"
)

// buildExporter returns the path of the program acceptq-exporter. Every user may run it.
func buildExporter(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat("cmd/acceptq-exporter/main.go"); err != nil {
		t.Skipf("the source is not here (%v): run go test in the source tree", err)
	}
	dir, err := os.MkdirTemp("", "acceptq-exporter")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "acceptq-exporter")
	out, err := exec.Command(program(t, "go", "golang"), "build", "-o", path, "./cmd/acceptq-exporter").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return path
}

// runProgram starts a program, which gets a SIGTERM at the end of the test: nginx stops its
// workers then.
func runProgram(t *testing.T, path string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(path, args...)
	log := new(strings.Builder)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, 20*time.Second
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", path, log)
		}
	})
	return cmd
}

// queueOf waits until something listens on addr.
func queueOf(t *testing.T, addr string) (q acceptq.Queue) {
	t.Helper()
	require.Eventually(t, func() bool {
		all, err := acceptq.Queues(t.Context())
		require.NoError(t, err)
		i := slices.IndexFunc(all, func(q acceptq.Queue) bool { return q.Addr.String() == addr })
		if i >= 0 {
			q = all[i]
		}
		return i >= 0
	}, 60*time.Second, time.Millisecond, "nothing listens on %s", addr)
	return q
}

// Of four servers that know nothing of this module one does not accept: nginx, whose only
// worker is stopped. A real Prometheus with the rules of alerts.yml scrapes acceptq-exporter.
// The alarms name nginx and its address, and nothing else.
func TestAlarmNamesTheServer(t *testing.T) {
	if os.Geteuid() != 0 {
		testkit.SkipUnprivileged(t, "only root can start nginx, which changes its user")
	}
	prometheus := program(t, "prometheus", "prometheus")
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin")
	nginx, haproxy := program(t, "nginx", "nginx-light"), program(t, "haproxy", "haproxy")
	testkit.InNamespace(t, func(t *testing.T) {
		const guilty, busy, quiet, target = "127.0.0.1:8081", "127.0.0.1:8082", "127.0.0.1:8083", "127.0.0.1:10511"
		startNginx := func(addr string, backlog int) {
			config := filepath.Join(t.TempDir(), "nginx.conf")
			require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `
daemon off; worker_processes 1; pid %[1]s.pid; error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s.body; proxy_temp_path %[1]s.proxy; fastcgi_temp_path %[1]s.fastcgi;
	uwsgi_temp_path %[1]s.uwsgi; scgi_temp_path %[1]s.scgi;
	server { listen %s backlog=%d; return 204; }
}`, config, addr, backlog), 0o600))
			runProgram(t, nginx, "-c", config)
		}
		startNginx(guilty, 8)
		startNginx(quiet, 511)
		config := filepath.Join(t.TempDir(), "haproxy.cfg")
		require.NoError(t, os.WriteFile(config, []byte(`
defaults
	mode http
	timeout connect 1s
	timeout client 10s
	timeout server 10s
frontend busy
	bind `+busy+`
	http-request return status 200
`), 0o600))
		runProgram(t, haproxy, "-db", "-f", config)
		started := time.Now()
		runProgram(t, buildExporter(t), "-listen", target)
		socket := queueOf(t, guilty)
		for _, addr := range []string{busy, quiet, target} {
			queueOf(t, addr)
		}

		rules := quick(t)
		p := startPrometheus(t, prometheus, 500*time.Millisecond, rules, fmt.Sprintf("job_name: machine, static_configs: [{targets: [%q]}]", target), 9090)
		p.wait(t, fmt.Sprintf(`tcp_accept_queue_drops_total{process="nginx",address=%q}`, guilty), is(0))
		p.wait(t, fmt.Sprintf(`tcp_accept_queue_length{process="haproxy",address=%q}`, busy), is(0))
		p.wait(t, fmt.Sprintf(`tcp_accept_queue_limit{process="nginx",address=%q}`, quiet), is(511))

		// The worker stops. The others go on serving.
		holders, _, err := observe.Processes(t.Context(), socket.Inode)
		require.NoError(t, err)
		require.Len(t, holders[socket.Inode], 2, "the master and its worker")
		worker := holders[socket.Inode][1].PID
		require.NoError(t, syscall.Kill(worker, syscall.SIGSTOP))
		t.Cleanup(func() { syscall.Kill(worker, syscall.SIGCONT) })
		done := make(chan struct{})
		served := make(chan int)
		go func() {
			n := 0
			for tick := time.NewTicker(50 * time.Millisecond); ; {
				select {
				case <-tick.C:
				case <-done:
					tick.Stop()
					served <- n
					return
				}
				for _, addr := range []string{busy, quiet} {
					if fetch(addr) {
						n++
					}
				}
			}
		}()
		tcp := net.TCPAddrFromAddrPort(socket.Addr)
		for dial(t, tcp, time.Second) { // until it is full
		}
		require.Equal(t, 9, queueOf(t, guilty).Stats.Queued)

		firing := func() (alarms []string) {
			var v vector
			err := p.try("query?query="+`count+by+(alertname,listener,address,process)(count_over_time(ALERTS{alertstate="firing"}[5m]))`, &v)
			if err != nil {
				return []string{err.Error()}
			}
			for _, r := range v.Result {
				alarms = append(alarms, fmt.Sprint(r.Metric["alertname"], ": ", r.Metric["process"], " at ", r.Metric["address"], ", listener ", r.Metric["listener"]))
			}
			slices.Sort(alarms)
			return alarms
		}
		want := []string{
			"AcceptQueueDrops: nginx at " + guilty + ", listener nginx " + guilty,
			"AcceptQueueFilling: nginx at " + guilty + ", listener nginx " + guilty,
		}
		var last any
		p.eventually(t, "the alarms", func() bool { last = firing(); return slices.Equal(want, firing()) }, &last)
		t.Logf("both alarms after %v", time.Since(started).Round(time.Second))
		slowest := time.Now().Add(7 * quickMinute)
		p.eventually(t, "the slowest rule", func() bool { return time.Now().After(slowest) })
		require.Equal(t, want, firing(), "and no other")
		close(done)
		t.Logf("%d requests to the other servers", <-served)

		// The dashboard shows nginx, except for what a foreign socket does not tell.
		foreign := regexp.MustCompile(`_peak\b|_wait_seconds|_accepted_total|_requested|_handshakes|shard!=""`)
		variables := strings.NewReplacer("$__rate_interval", "1m", "$listener", "nginx "+guilty, "$job", "machine", "$instance", ".*")
		_, d := readDashboard(t)
		for _, panel := range d.Panels {
			for _, target := range panel.Targets {
				query := variables.Replace(target.Expr)
				if foreign.MatchString(query) && !strings.Contains(query, " or ") {
					require.Empty(t, p.query(t, query), panel.Title)
				} else {
					p.wait(t, query, func(v float64) bool { return v == v }) // not NaN
				}
			}
		}
		require.Empty(t, p.query(t, `{__name__=~"tcp_.*"} < 0`), "what is unknown is absent")
		require.Empty(t, p.query(t, `min_over_time(up[5m]) == 0`), "no scrape failed")
	})
}

// fetch sends a request and reads the answer.
func fetch(addr string) bool {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Get("http://" + addr)
	if err == nil {
		resp.Body.Close()
	}
	return err == nil
}

// The exporter needs no privilege for its figures. It says once that it cannot name the
// processes of others, and it stops when it is told to.
func TestExporterWithoutPrivilege(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	if os.Geteuid() != 0 {
		testkit.SkipUnprivileged(t, "only root can start a program as another user")
	}
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, acceptq.WithBacklog(7))
		cmd := exec.Command(buildExporter(t), "-listen", "127.0.0.1:0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		t.Cleanup(func() { cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		require.True(t, lines.Scan())
		addr, ok := strings.CutPrefix(lines.Text(), "acceptq-exporter: listening on ")
		require.True(t, ok, lines.Text())

		resp, err := http.Get("http://" + addr + "/metrics")
		require.NoError(t, err)
		defer resp.Body.Close()
		page, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Contains(t, string(page), fmt.Sprintf("tcp_accept_queue_capacity{address=%q,listener=%[1]q,process=\"\"} 8\n", ln.Addr()))
		require.Contains(t, string(page), fmt.Sprintf("tcp_accept_queue_length{address=%q,listener=\"acceptq-exporte %[1]s\",process=\"acceptq-exporte\"} 0\n", addr), "its own")
		check := exec.Command(promtool, "check", "metrics")
		check.Stdin = strings.NewReader(string(page))
		problems, err := check.CombinedOutput()
		require.NoError(t, err, "%s", problems)
		require.Empty(t, string(problems))

		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		var more []string
		for lines.Scan() {
			more = append(more, lines.Text())
		}
		require.NoError(t, cmd.Wait())
		require.Len(t, more, 1)
		require.Equal(t, "acceptq-exporter: some processes cannot be read, so the label process may be empty; "+
			"the capabilities CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH usually allow it", more[0])
	})
}

// systemd accepts the unit.
func TestExporterUnit(t *testing.T) {
	analyze := program(t, "systemd-analyze", "systemd")
	const name = "acceptq-exporter.service"
	text, err := os.ReadFile(filepath.Join("cmd/acceptq-exporter", name))
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	unit := filepath.Join(dir, name)
	text = []byte(strings.Replace(string(text), "/usr/local/bin/acceptq-exporter", "/bin/true", 1)) // it must exist
	require.NoError(t, os.WriteFile(unit, text, 0o600))
	out, err := exec.CommandContext(t.Context(), analyze, "verify", "--recursive-errors=no", unit).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), dir, "a warning")
}
