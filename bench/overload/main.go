//go:build linux

// Overload measures a server under more load than it can serve: how many clients get an answer before
// they give up. It compares a long accept queue, a short one, and a long one with a server that turns
// away clients that have waited too long.
//
//	go run -C bench ./overload
//
// It writes results/overload.txt, in Go's benchmark format, and the table and the
// picture of docs/overload.md. It needs Linux, and root or unprivileged user
// namespaces. The clients and the server are separate processes in a new network
// namespace.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/bench/internal/isolate"
	"github.com/acceptq/acceptq/bench/internal/page"
	"github.com/acceptq/acceptq/bench/internal/picture"
	"golang.org/x/sys/unix"
)

const (
	workers  = 8                      // connections that the server has at a time
	work     = 20 * time.Millisecond  // for each request; the server sleeps and needs no CPU
	patience = time.Second            // of a client, for each try
	tries    = 3                      // then the client stops
	budget   = 500 * time.Millisecond // of the servers that turn clients away
	target   = 50 * time.Millisecond  // of a wait, for the server that adapts its budget
	capacity = float64(workers) / float64(work) * float64(time.Second)
)

// A server is one row of the table. Its name is that of its benchmark.
type server struct {
	name, title string
	backlog     int
	budget      time.Duration // 0 turns no client away
	context     bool          // the work ends when net/http notices that the client has closed
	adapts      bool          // the budget is smaller while there is a standing queue
}

var servers = []server{
	{name: "long", title: "long queue", backlog: 4096},
	{name: "short", title: "short queue", backlog: int(capacity * budget.Seconds())},
	{name: "shed", title: "long queue, shedding", backlog: 4096, budget: budget},
	{name: "adapt", title: "long queue, adaptive shedding", backlog: 4096, budget: budget, adapts: true},
	{name: "context", title: "long queue, work ends with the client", backlog: 4096, context: true},
}

// loads are the rates of new clients, as multiples of the capacity of the server. Each
// client tries up to three times.
var loads = []float64{0.5, 0.8, 1, 1.2, 1.5, 2}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "overload:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "serve":
			return serve(os.Args[2:])
		case "round":
			return round(os.Args[2:])
		}
	}
	rounds := flag.Int("rounds", 5, "number of `rounds`; each runs every server under every load, in a random order")
	short := flag.Bool("short", false, "run everything for a short time, to check that it works; without -out, write nothing")
	draw := flag.Bool("draw", false, "measure nothing; write the table and the picture of earlier results again")
	out := flag.String("out", "", "write to this `directory` instead of results/ and docs/")
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case *rounds < 1:
		return fmt.Errorf("-rounds %d: must be at least 1", *rounds)
	}
	if _, err := os.Stat("../docs"); err != nil {
		return errors.New("run this in the directory bench, or as: go run -C bench ./overload")
	}
	results, pageName, pictureName := "results/overload.txt", "../docs/overload.md", "../docs/overload"
	if *out != "" {
		results, pageName, pictureName = filepath.Join(*out, "overload.txt"), "", filepath.Join(*out, "overload")
	}
	if err := os.MkdirAll(filepath.Dir(results), 0o777); err != nil {
		return err
	}
	if !*draw {
		text := describe(*short)
		for i := range *rounds {
			lines, err := inNamespace(*short)
			if err != nil {
				return fmt.Errorf("round %d: %w", i+1, err)
			}
			text += lines
			fmt.Fprintf(os.Stderr, "round %d of %d\n", i+1, *rounds)
		}
		if *short && *out == "" {
			_, err := io.WriteString(os.Stdout, text)
			return err
		}
		if err := os.WriteFile(results, []byte(text), 0o666); err != nil {
			return err
		}
	}
	figures, err := read(results)
	if err != nil {
		return err
	}
	svg, err := figures.picture()
	if err == nil {
		err = picture.Write(pictureName, svg)
	}
	if err != nil {
		return err
	}
	if pageName == "" {
		_, err = io.WriteString(os.Stdout, figures.table())
		return err
	}
	return page.Write(pageName, "go run -C bench ./overload -draw", figures.table())
}

// describe returns the configuration lines of Go's benchmark format.
func describe(short bool) string {
	line := func(command ...string) string {
		out, err := exec.Command(command[0], command[1:]...).Output()
		if err != nil {
			return "unknown"
		}
		return strings.TrimSpace(string(out))
	}
	commit := line("git", "rev-parse", "--short=12", "HEAD")
	if line("git", "status", "--porcelain", "--untracked-files=no") != "" {
		commit += " with changes that were not committed"
	}
	var name unix.Utsname
	unix.Uname(&name)
	load, _ := os.ReadFile("/proc/loadavg")
	text := fmt.Sprintf("date: %s\ncommit: %s\nmachine: Linux %s, %d CPUs, %s\nload: %s\n",
		time.Now().UTC().Format(time.DateOnly), commit, unix.ByteSliceToString(name.Release[:]), runtime.NumCPU(), runtime.Version(),
		strings.Join(strings.Fields(string(load))[:3], " "))
	if short {
		text += "short: the figures are worth nothing\n"
	}
	return text
}

// inNamespace runs one round in a new network namespace and returns its lines.
func inNamespace(short bool) (string, error) {
	args := []string{"round"}
	if short {
		args = append(args, "short")
	}
	cmd := isolate.Command(args...)
	out, err := cmd.Output()
	return string(out), isolate.Explain(cmd, err)
}

// round measures every server under every load, in the namespace, and prints a line
// for each.
func round(args []string) error {
	if err := errors.Join(isolate.Enter(), isolate.SetSysctl("net.core.somaxconn", 4096)); err != nil {
		return err
	}
	warm, measured := 15*time.Second, 10*time.Second
	if len(args) > 0 { // short
		warm, measured = 500*time.Millisecond, 500*time.Millisecond
	}
	type point struct {
		server
		load float64
	}
	var points []point
	for _, s := range servers {
		for _, load := range loads {
			points = append(points, point{s, load})
		}
	}
	rand.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
	for _, p := range points {
		line, err := p.measure(p.load, warm, measured)
		if err != nil {
			return fmt.Errorf("%s, load %v: %w", p.name, p.load, err)
		}
		fmt.Printf("BenchmarkOverload/server=%s/load=%v 1 %s\n", p.name, p.load, line)
	}
	return nil
}

// measure starts the server, and sends clients until the queue has settled. Then it
// counts the results of later clients.
func (s server) measure(load float64, warm, measured time.Duration) (line string, err error) {
	cmd := exec.Command("/proc/self/exe", "serve", fmt.Sprint(s.backlog), s.budget.String(), fmt.Sprint(s.context), fmt.Sprint(s.adapts))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the kernel sends the signal when the thread that started the server ends
	defer runtime.UnlockOSThread()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		return "", errors.New("the server did not start")
	}
	crowd := newCrowd(lines.Text())
	crowd.come(load*capacity, warm, measured)

	cmd.Process.Signal(syscall.SIGTERM)
	if !lines.Scan() {
		return "", errors.New("the server reported nothing at its end")
	}
	return crowd.report(measured) + " " + lines.Text(), nil
}
