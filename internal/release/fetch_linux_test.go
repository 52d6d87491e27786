package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const version = "v0.999.0"

// A release that is made from the tree can be fetched, and programs that use it build and run.
// The machine's module proxy has only the modules of others.
func TestFetch(t *testing.T) {
	tree, proxy := filepath.Join(t.TempDir(), "tree"), filepath.Join(t.TempDir(), "proxy")
	release(t, tree)
	for _, f := range published {
		git(t, tree, "checkout", "-q", f.tag(version))
		packed := t.TempDir()
		require.NoError(t, export(tree, packed))
		require.NoError(t, pack(packed, f, version, proxy))
	}
	env := environment(t, proxy)

	t.Run("checkout of a tag", func(t *testing.T) { checkout(t, tree, env) })
	t.Run("go install", func(t *testing.T) { install(t, tree, env) })
	t.Run("go get", func(t *testing.T) { get(t, tree, env) })
}

// release makes a release in a copy of the tree with the commands that .ci/release prints,
// except for the last one, which publishes it.
func release(t *testing.T, tree string) {
	require.NoError(t, export(root, tree))
	git(t, tree, "init", "-q", "-b", "main")
	git(t, tree, "add", "--all")
	git(t, tree, "commit", "-q", "-m", "the tree")
	before := git(t, tree, "rev-parse", "HEAD")

	require.NoError(t, prepare(tree, version, time.Now()))
	commands, push, found := strings.Cut(steps(version), "git push ")
	require.True(t, found)
	require.Equal(t, "--atomic origin HEAD v0.999.0 prom/v0.999.0 otel/v0.999.0\n", push)
	for command := range strings.Lines(commands) {
		if strings.HasPrefix(command, "git ") {
			var args []string
			for _, word := range regexp.MustCompile(`'[^']*'|\S+`).FindAllString(command, -1)[1:] {
				args = append(args, strings.Trim(word, "'"))
			}
			git(t, tree, args...)
		}
	}
	require.Equal(t, "otel/v0.999.0\nprom/v0.999.0\nv0.999.0\n", git(t, tree, "tag"))
	require.Empty(t, git(t, tree, "status", "--porcelain"))
	changed := git(t, tree, "diff", "--name-only", strings.TrimSpace(before), "HEAD")
	require.Equal(t, "CHANGELOG.md\ninternal/release/api/released/acceptq.txt\ninternal/release/api/released/otel.txt\ninternal/release/api/released/prom.txt\n", changed,
		"between releases the go.mod files are as before")
}

// environment returns an environment in which the go command has an empty module cache, and
// gets the modules of this repository from proxy.
func environment(t *testing.T, proxy string) []string {
	cached, err := output(".", "go", "env", "GOMODCACHE")
	require.NoError(t, err)
	others, err := output(".", "go", "env", "GOPROXY")
	require.NoError(t, err)
	return []string{
		// What is in the module cache of the machine is not downloaded again.
		"GOPROXY=file://" + proxy + ",file://" + strings.TrimSpace(cached) + "/cache/download," + strings.TrimSpace(others),
		"GONOSUMDB=" + rootPath,
		"GOMODCACHE=" + t.TempDir(),
		"GOFLAGS=-modcacherw",
		"GOWORK=off",
		"GOBIN=" + t.TempDir(),
	}
}

// must runs a command that must succeed, and returns what it prints.
func must(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	out, err := outputEnv(dir, env, name, args...)
	require.NoError(t, err)
	return out
}

// checkout builds the published modules from a checkout of the release.
func checkout(t *testing.T, tree string, env []string) {
	git(t, tree, "checkout", "-q", version)
	for _, f := range published {
		dir := filepath.Join(tree, string(f))
		require.NotContains(t, must(t, dir, env, "go", "mod", "edit", "-print"), "replace", "go install refuses a replace directive")
		require.Empty(t, must(t, dir, env, "go", "mod", "tidy", "-diff"))
		must(t, dir, env, "go", "vet", "./...")
	}
	for _, name := range []string{"prom/interop", "otel/interop", "interop", "bench", "examples/live"} {
		must(t, filepath.Join(tree, name), env, "go", "list", "-deps", "./...")
	}
}

// install installs and starts every command of the published modules.
func install(t *testing.T, tree string, env []string) {
	for _, f := range published {
		commands, err := filepath.Glob(filepath.Join(tree, string(f), "cmd", "*"))
		require.NoError(t, err)
		if commands == nil {
			t.Logf("not here: %s has no folder cmd", f.path())
		}
		for _, dir := range commands {
			bin := t.TempDir()
			at := path.Join(f.path(), "cmd", filepath.Base(dir)) + "@" + version
			must(t, bin, append(env, "GOBIN="+bin), "go", "install", at)
			out, err := exec.Command(filepath.Join(bin, filepath.Base(dir)), "-h").CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.Contains(t, string(out), filepath.Base(dir))
		}
	}
}

// get makes a module that requires the release, with the programs of the documentation, and
// runs them.
func get(t *testing.T, tree string, env []string) {
	dir := t.TempDir()
	must(t, dir, env, "go", "mod", "init", "example.com/consumer")
	for _, f := range published {
		must(t, dir, env, "go", "get", f.path()+"@"+version)
	}
	require.NoError(t, os.CopyFS(filepath.Join(dir, "server"), os.DirFS("testdata/server")))
	sources, err := filepath.Glob(filepath.Join(tree, "examples", "backlog", "*.go"))
	require.NoError(t, err)
	for _, name := range sources {
		if !strings.HasSuffix(name, "_test.go") {
			copyTo(t, name, filepath.Join(dir, "backlog"))
		}
	}
	for _, f := range published[1:] {
		copyTo(t, filepath.Join(tree, string(f), "example_linux_test.go"), filepath.Join(dir, string(f)+"example"))
	}
	var blocks []string
	for _, f := range published {
		text, err := os.ReadFile(filepath.Join(tree, string(f), "README.md"))
		require.NoError(t, err)
		for i, program := range programs(string(text)) {
			name := fmt.Sprintf("readme-%s-%d", f.name(), i+1)
			require.NoError(t, writeFile(filepath.Join(dir, name, "main.go"), []byte(program), 0o666))
			blocks = append(blocks, name)
		}
	}
	must(t, dir, env, "go", "mod", "tidy")
	must(t, dir, env, "go", "vet", "./...")
	bin := t.TempDir()
	must(t, dir, env, "go", "build", "-o", bin+"/", "./...")

	for _, f := range published {
		used := must(t, dir, env, "go", "list", "-m", "-f", "{{.Version}}{{with .Replace}} replaced{{end}}", f.path())
		require.Equal(t, version+"\n", used)
	}
	require.Equal(t, []string{rootPath, rootPath + "/prom"}, beyond(t, dir, env, "prom", "github.com/prometheus/client_golang/prometheus"))
	require.Equal(t, []string{rootPath, rootPath + "/otel"}, beyond(t, dir, env, "otel", "go.opentelemetry.io/otel/metric"))

	must(t, dir, env, "go", "test", "./...") // the examples
	must(t, dir, nil, filepath.Join(bin, "backlog"))
	t.Run("server", func(t *testing.T) { serve(t, filepath.Join(bin, "server")) })
	if blocks == nil {
		t.Log("not here: no README has a Go block that is a whole program")
	}
	for _, name := range blocks {
		t.Run(name, func(t *testing.T) { start(t, filepath.Join(bin, name)) })
	}
}

func copyTo(t *testing.T, name, dir string) {
	t.Helper()
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	require.NoError(t, writeFile(filepath.Join(dir, filepath.Base(name)), text, 0o666))
}

// program matches a Go block that is a whole program.
var program = regexp.MustCompile("(?ms)^```go\n((?:// [^\n]*\n)*package main\n.*?)^```$")

// programs returns the programs of a page.
func programs(page string) (all []string) {
	for _, m := range program.FindAllStringSubmatch(page, -1) {
		all = append(all, m[1])
	}
	return all
}

func TestPrograms(t *testing.T) {
	require.Equal(t, []string{"package main\n\nfunc main() {}\n", "// Command x.\npackage main\n"}, programs(
		"```go\npackage main\n\nfunc main() {}\n```\n```go\nln.Close()\n```\n```sh\npackage main\n```\n```go\n// Command x.\npackage main\n```\n"))
}

// beyond returns the modules that a published module needs and another package does not, except
// for golang.org/x/sys, which the root needs.
func beyond(t *testing.T, dir string, env []string, module, pkg string) []string {
	needs := func(pkg string) []string {
		out := must(t, dir, env, "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", pkg)
		modules := strings.Fields(out)
		slices.Sort(modules)
		return slices.Compact(modules)
	}
	others := append(needs(pkg), "golang.org/x/sys")
	return slices.DeleteFunc(needs(rootPath+"/"+module), func(m string) bool { return slices.Contains(others, m) })
}

// patience is how long a program may take for one step.
const patience = 20 * time.Second

// running is a program that runs until the test is over, or ends by itself.
type running struct {
	*exec.Cmd
	output string // the name of the file with its output and messages
	ended  chan struct{}
	err    error // of Wait; set when ended is closed
}

// runProgram starts a program. It must end well after SIGTERM.
func runProgram(t *testing.T, cmd *exec.Cmd) *running {
	t.Helper()
	r := &running{Cmd: cmd, output: filepath.Join(t.TempDir(), "output"), ended: make(chan struct{})}
	file, err := os.Create(r.output)
	require.NoError(t, err)
	defer file.Close()
	cmd.Stdout, cmd.Stderr = file, file
	require.NoError(t, cmd.Start())
	go func() {
		r.err = cmd.Wait()
		close(r.ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // fails if the program has ended
		late := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer late.Stop()
		<-r.ended
		// A program without a handler ends by the signal.
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGTERM {
			require.NoError(t, r.err, "%s", r.read())
		}
	})
	return r
}

func (r *running) read() string {
	text, err := os.ReadFile(r.output)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (r *running) hasEnded() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// start runs a program of a README in a network namespace of its own, where every port is
// free, until it listens or ends.
func start(t *testing.T, binary string) {
	cmd := exec.Command("sh", "-c", `ip link set lo up && exec "$0"`, binary)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	r := runProgram(t, cmd)
	require.Eventually(t, func() bool { return r.hasEnded() || listens(cmd.Process.Pid) }, patience, 10*time.Millisecond,
		"it neither listens nor ends: %s", r.read())
}

// listens reports whether a socket listens in the network namespace of a process.
func listens(pid int) bool {
	for _, name := range []string{"tcp", "tcp6"} {
		table, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name)) // fails if the process has ended
		for line := range strings.Lines(string(table)) {
			if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "0A" {
				return true
			}
		}
	}
	return false
}

// serve runs the server of testdata and reads its pages.
func serve(t *testing.T, binary string) {
	r := runProgram(t, exec.Command(binary))
	require.Eventually(t, func() bool { return r.hasEnded() || strings.Contains(r.read(), "\n") }, patience, 10*time.Millisecond)
	require.False(t, r.hasEnded(), "%s", r.read())
	addr := strings.TrimSpace(r.read())
	client := &http.Client{Timeout: patience}
	for page, want := range map[string]string{
		"/healthz": "",
		"/metrics": `tcp_accept_queue_capacity{listener="api"} 17`,
		"/otel":    "tcp.accept_queue.capacity",
	} {
		resp, err := client.Get("http://" + addr + page)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode, "%s: %s", page, body)
		require.Contains(t, string(body), want, page)
	}
	client.CloseIdleConnections()
}
