package interop

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/acceptq/acceptq/observe"
	"github.com/stretchr/testify/require"
)

// A foreign is a server that knows nothing of this library.
type foreign struct {
	program, debianPackage string
	args                   []string // {dir} is a folder
	config                 string   // of the file {dir}/config
	addr                   string
	name                   string // its process name begins so
	limit                  int    // what it asks of listen(2); 0 differs by release
	holders                int
}

var foreigns = []foreign{
	{
		program: "nginx", debianPackage: "nginx-light", args: []string{"-c", "{dir}/config"}, addr: "127.0.0.1:8081", name: "nginx", limit: 511, holders: 3,
		config: `
daemon off;
worker_processes 2;
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
	server { listen 127.0.0.1:8081; return 200 served; }
}
`},
	{
		program: "haproxy", debianPackage: "haproxy", args: []string{"-db", "-f", "{dir}/config"}, addr: "127.0.0.1:8082", name: "haproxy", holders: 1,
		config: `
defaults
	mode http
	timeout connect 10s
	timeout client 20s
	timeout server 20s
frontend front
	bind 127.0.0.1:8082
	http-request return status 200 content-type text/plain string served
`},
	{
		program: "redis-server", debianPackage: "redis-server", addr: "127.0.0.1:8083", name: "redis-server", limit: 511, holders: 1,
		args: []string{"--port", "8083", "--bind", "127.0.0.1", "--save", "", "--dir", "{dir}"},
	},
	{
		program: "python3", debianPackage: "python3", addr: "127.0.0.1:8084", name: "python", limit: 5, holders: 1,
		args: []string{"-m", "http.server", "--bind", "127.0.0.1", "--directory", "{dir}", "8084"},
	},
	{ // a socket that systemd holds for a service that does not run
		program: "systemd-socket-activate", debianPackage: "systemd", addr: "127.0.0.1:8085", name: "systemd-socket-", limit: 4096, holders: 1,
		args: []string{"-l", "127.0.0.1:8085", "/bin/true"},
	},
}

// start starts a server, which ends with the test.
func (f foreign) start(t *testing.T) *exec.Cmd {
	t.Helper()
	program := need(t, f.program, f.debianPackage)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config"), []byte(strings.ReplaceAll(f.config, "{dir}", dir)), 0o600))
	var args []string
	for _, arg := range f.args {
		args = append(args, strings.ReplaceAll(arg, "{dir}", dir))
	}
	cmd := exec.Command(program, args...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Signal(syscall.SIGTERM) // nginx ends its workers
		cmd.Wait()
	})
	return cmd
}

// A commandListener is a listener in the JSON of the command.
type commandListener struct {
	acceptq.Queue
	Processes []observe.Process `json:"processes"`
}

func buildCommand(t *testing.T, path string) {
	t.Helper()
	out, err := exec.Command("go", "build", "-o", path, "github.com/acceptq/acceptq/cmd/acceptq").CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// acceptqCommand builds the command, and returns a function that runs it.
func acceptqCommand(t *testing.T) func(args ...string) (status int, out string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "acceptq")
	buildCommand(t, path)
	return func(args ...string) (int, string) {
		cmd := exec.Command(path, args...)
		out, _ := cmd.CombinedOutput()
		require.NotNil(t, cmd.ProcessState)
		return cmd.ProcessState.ExitCode(), string(out)
	}
}

func commandList(t *testing.T, run func(...string) (int, string)) map[string]commandListener {
	t.Helper()
	status, out := run("-json")
	require.Zero(t, status, out)
	var r struct{ Listeners []commandListener }
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	all := map[string]commandListener{}
	for _, l := range r.Listeners {
		all[l.Addr.String()] = l
	}
	return all
}

// requireAsSS requires that the command lists what ss lists: the same sockets with the same
// numbers and the same processes.
func requireAsSS(t *testing.T, all map[string]commandListener) {
	t.Helper()
	out, err := exec.Command(need(t, "ss", "iproute2"), "-ltmnpHO").CombinedOutput()
	require.NoError(t, err, "%s", out)
	line := regexp.MustCompile(`^LISTEN +(\d+) +(\d+) +(\S+) .*skmem:\(.*,d(\d+)\)`)
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	require.Len(t, lines, len(all), "%s", out)
	for _, text := range lines {
		f := line.FindStringSubmatch(text)
		require.NotNil(t, f, text)
		l, ok := all[f[3]]
		require.True(t, ok, text)
		require.Equal(t, f[1], strconv.Itoa(l.Stats.Queued), text)
		require.Equal(t, f[2], strconv.Itoa(l.Stats.Limit), text)
		require.Equal(t, f[4], strconv.FormatInt(l.Stats.Drops, 10), text)
		var want []string
		for _, m := range regexp.MustCompile(`pid=(\d+)`).FindAllStringSubmatch(text, -1) {
			if !slices.Contains(want, m[1]) {
				want = append(want, m[1])
			}
		}
		var got []string
		for _, p := range l.Processes {
			got = append(got, strconv.Itoa(p.PID))
		}
		require.ElementsMatch(t, want, got, text)
	}
}

// Among five servers that know nothing of this library and a Go server of net.Listen, the
// command finds the one that makes clients stall, and says why and what mends it.
func TestCommandFindsTheStalledServer(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		run := acceptqCommand(t)
		started := map[string]*exec.Cmd{}
		for _, f := range foreigns {
			started[f.program] = f.start(t)
		}
		own, err := net.Listen("tcp", "127.0.0.1:8086")
		require.NoError(t, err)
		defer own.Close()

		var all map[string]commandListener
		until(t, "the servers", func() bool {
			all = commandList(t, run)
			return !slices.ContainsFunc(foreigns, func(f foreign) bool { return len(all[f.addr].Processes) != f.holders })
		})
		for _, f := range foreigns {
			l := all[f.addr]
			require.True(t, strings.HasPrefix(l.Processes[0].Name, f.name), "%+v", l)
			if f.limit != 0 {
				require.Equal(t, f.limit, l.Stats.Limit, f.program)
			}
			pids := make([]int, len(l.Processes))
			for i, p := range l.Processes {
				pids[i] = p.PID
			}
			require.Contains(t, pids, started[f.program].Process.Pid)
		}
		require.Len(t, all, len(foreigns)+1)
		requireAsSS(t, all)
		status, out := run("check", "-for", "100ms")
		require.Zero(t, status, out)

		// The Python server stops. Its clients fill the queue, and one more is dropped.
		python := started["python3"].Process
		require.NoError(t, python.Signal(syscall.SIGSTOP))
		before := testkit.KernelCounter(t, "ListenOverflows")
		for testkit.KernelCounter(t, "ListenOverflows") == before {
			c, err := net.DialTimeout("tcp", "127.0.0.1:8084", 100*time.Millisecond)
			if err == nil {
				defer c.Close()
			}
		}
		for _, addr := range []string{"127.0.0.1:8081", "127.0.0.1:8082"} {
			require.NoError(t, get(addr), "the other servers answer")
		}
		all = commandList(t, run)
		requireAsSS(t, all)
		require.Equal(t, 6, all["127.0.0.1:8084"].Stats.Queued)

		status, out = run()
		require.Zero(t, status)
		require.Regexp(t, `^ADDRESS .*\n127\.0\.0\.1:8084  +python\S* `+strconv.Itoa(python.Pid)+` +\[##########\] 6/6 `, out)
		status, out = run("check", "-for", "1s")
		require.Equal(t, 2, status, out)
		require.Regexp(t, fmt.Sprintf(`(?m)^CRITICAL: python\S* \(pid %d\) on 127\.0\.0\.1:8084 has accepted nobody for `, python.Pid), out)
		require.Regexp(t, `(?m)^CRITICAL: python.* The accept queue is full, 6 queued of 6\.`, out)
		require.Contains(t, out, fmt.Sprintf("\n  A signal has stopped the process. Continue it: kill -CONT %d\n", python.Pid))
		for _, quiet := range []string{"nginx", "haproxy", "redis", "systemd"} {
			require.NotContains(t, out, quiet)
		}
		status, out = run("waiting", ":8084")
		require.Zero(t, status)
		require.Equal(t, 6, strings.Count(out, " bytes"), out)
		status, out = run("who", "8081")
		require.Zero(t, status)
		require.Contains(t, out, fmt.Sprintf("nginx (pid %d) listens on 127.0.0.1:8081", started["nginx"].Process.Pid))

		require.NoError(t, python.Signal(syscall.SIGCONT))
		until(t, "the queue to be empty", func() bool { return commandList(t, run)["127.0.0.1:8084"].Stats.Queued == 0 })
		status, out = run("check", "-for", "100ms")
		require.Zero(t, status, out)
		requireAsSS(t, commandList(t, run))
	})
}

// The CPU time of the command is about that of ss with 1,000 listeners, in alternating runs:
// with -n that of ss without processes, otherwise that of ss with processes.
func TestCommandCost(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes some seconds")
	}
	testkit.InNamespace(t, func(t *testing.T) {
		ss := need(t, "ss", "iproute2")
		path := filepath.Join(t.TempDir(), "acceptq")
		buildCommand(t, path)
		for range 1000 {
			ln, err := acceptq.ListenTCP("127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
		}
		commands := [][]string{{path, "-n"}, {ss, "-ltmH"}, {path}, {ss, "-ltmpH"}}
		costs := make([][]time.Duration, len(commands))
		for range 21 {
			for i, c := range commands {
				cmd := exec.Command(c[0], c[1:]...)
				out, err := cmd.Output()
				require.NoError(t, err)
				require.GreaterOrEqual(t, strings.Count(string(out), "\n"), 1000)
				costs[i] = append(costs[i], cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
			}
		}
		// The smallest cost is that of the run which other load has disturbed least.
		least := func(i int) float64 { return slices.Min(costs[i]).Seconds() }
		plain, named, more := least(0)/least(1), least(2)/least(3), least(2)/least(1)
		t.Logf("CPU time: acceptq -n %.2f × ss -ltmH, acceptq %.2f × ss -ltmpH and %.2f × ss -ltmH (%.1f ms)",
			plain, named, more, 1000*least(1))
		require.Less(t, plain, 1.5)
		require.Less(t, named, 1.5)
	})
}
