package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

const (
	tamperEnv = "ACCEPTQ_TAMPER"    // set to 1: strace tampers with system calls, for a minute
	lifeEnv   = "ACCEPTQ_TEST_LIFE" // set in the program that is tampered with
)

// tampering has the results that strace injects for each system call of a life: an errno of
// its manual page, or a wrong answer. close is left out: with an injected result it would
// not close, but the real one always does.
var tampering = map[string][]string{
	"socket":      errnos("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EACCES", "EPERM", "EAFNOSUPPORT"),
	"bind":        errnos("EADDRINUSE", "EADDRNOTAVAIL", "EACCES", "EINVAL"),
	"listen":      errnos("EADDRINUSE", "EINVAL", "EOPNOTSUPP", "EACCES"),
	"accept4":     errnos("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "ECONNABORTED", "EAGAIN"),
	"getsockopt":  append(errnos("EINVAL", "ENOPROTOOPT", "ENOBUFS", "EPERM"), "retval=0", "poke_exit=@arg4=ffffffff", "poke_exit=@arg5=00000000"),
	"setsockopt":  append(errnos("EINVAL", "ENOPROTOOPT", "EPERM", "ENOMEM", "EDOM"), "retval=0"),
	"getsockname": append(errnos("ENOBUFS", "EINVAL", "EBADF"), "retval=0"),
	"fcntl":       errnos("EMFILE", "EINVAL", "EBADF"),
	"epoll_ctl":   errnos("ENOMEM", "ENOSPC", "EPERM"),
	"openat":      errnos("EMFILE", "ENFILE", "ENOENT", "EACCES", "EIO"),
	// sock_diag(7) is read by read(2) too, and the fuzz test of its parser has wrong answers.
	"read":   append(errnos("EIO", "EISDIR", "ENOMEM", "ENOBUFS"), "retval=0", "poke_exit=@arg2=2d"),
	"sendto": append(errnos("ENOBUFS", "EPERM", "ECONNREFUSED"), "retval=0"),
}

func errnos(names ...string) (expressions []string) {
	for _, name := range append(names, "EINTR") {
		expressions = append(expressions, "error="+name)
	}
	return expressions
}

// always reports whether a kernel may return this result every time. For the other
// errors net retries until they end.
func always(call, expression string) bool {
	return expression != "error=EINTR" && !(call == "accept4" && expression == "error=ECONNABORTED") &&
		!(call == "getsockopt" && !strings.HasPrefix(expression, "error="))
}

// misled reports whether an injected success cannot be detected. Either net was told
// that a socket has no type, and then net itself panics (newFileFD in
// net/file_posix.go), or a stop was not lifted.
func misled(injected string) bool {
	return !strings.Contains(injected, "= -1 ") && slices.ContainsFunc(
		[]string{"SO_TYPE", "SO_DETACH_FILTER", "IP_MINTTL", "IPV6_MINHOPCOUNT"},
		func(option string) bool { return strings.Contains(injected, option) })
}

// A program runs on one thread. strace changes the result of each system call of that
// thread in turn, and then of all calls of a kind. This includes the calls of package
// net. The program must end in time, without an error or with one of this package. It
// must leave nothing behind, and it must serve the queued clients.
func TestTamperedKernel(t *testing.T) {
	if os.Getenv(lifeEnv) != "" {
		liveOnCommand(t)
		return
	}
	if os.Getenv(tamperEnv) == "" {
		t.Skipf("it takes a minute: %s=1 go test -v -run %s", tamperEnv, t.Name())
	}
	if _, err := exec.LookPath("strace"); err != nil {
		t.Fatal("install strace: ", err)
	}
	p := &tampered{t: t}
	defer p.end()

	calls := map[string]int{}
	trace, problem := p.live(strings.Join(slices.Sorted(maps.Keys(tampering)), ","), "")
	require.Empty(t, problem)
	for line := range strings.Lines(trace) {
		name, _, _ := strings.Cut(line, "(")
		calls[name]++
	}
	require.GreaterOrEqual(t, calls["accept4"], 3, "%v", calls)
	var faults, survived int
	for _, call := range slices.Sorted(maps.Keys(tampering)) {
		require.NotZero(t, calls[call], call)
		had, did := faults, survived
		try := func(expression, when string) {
			trace, problem := p.live(call, call+":"+expression+":when="+when)
			injected := ""
			for line := range strings.Lines(trace) {
				if strings.Contains(line, "(INJECTED") {
					injected = line
				}
			}
			if injected == "" || misled(injected) {
				return // the number of looks of a drain varies
			}
			faults++
			if problem == "" {
				survived++
				return
			}
			t.Errorf("%s %s: %s\n%s", expression, when, problem, injected)
		}
		wrong := tampering[call]
		for nth := 1; nth <= calls[call]; nth++ {
			for i := range 2 { // two results for each call, other results for the next call
				try(wrong[(2*nth+i)%len(wrong)], strconv.Itoa(nth))
			}
		}
		for _, expression := range wrong {
			if always(call, expression) {
				try(expression, "1+")
			}
		}
		t.Logf("%-12s %3d calls, %2d ways: %4d faults, %4d survived", call, calls[call], len(wrong), faults-had, survived-did)
	}
	t.Logf("%d faults, %d survived", faults, survived)
	require.Equal(t, faults, survived)
}

// A tampered is the program under strace. It is started again if it does not survive.
type tampered struct {
	t       *testing.T
	cmd     *exec.Cmd
	thread  string
	stdin   io.WriteCloser
	replies chan string
	output  strings.Builder
}

func (p *tampered) begin() {
	self, err := os.Executable()
	require.NoError(p.t, err)
	p.cmd = exec.Command(self, "-test.run=^"+p.t.Name()+"$", "-test.timeout=10m")
	p.cmd.Env = append(os.Environ(), lifeEnv+"=1")
	p.output.Reset()
	p.cmd.Stderr = &p.output
	p.stdin, err = p.cmd.StdinPipe()
	require.NoError(p.t, err)
	stdout, err := p.cmd.StdoutPipe()
	require.NoError(p.t, err)
	require.NoError(p.t, p.cmd.Start())
	replies := make(chan string)
	p.replies = replies
	go func() {
		defer close(replies)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if reply, ok := strings.CutPrefix(lines.Text(), "life: "); ok {
				replies <- reply
			}
		}
	}()
	p.thread = <-p.replies
}

func (p *tampered) end() {
	if p.cmd == nil {
		return
	}
	p.stdin.Close()
	for range p.replies {
	}
	p.cmd.Wait()
	p.cmd = nil
}

// live runs the life of the program once under strace, and describes what went wrong.
func (p *tampered) live(trace, inject string) (traced, problem string) {
	if p.cmd == nil {
		p.begin()
	}
	out := filepath.Join(p.t.TempDir(), "trace")
	args := []string{"-p", p.thread, "-o", out, "-e", "trace=" + trace}
	if inject != "" {
		args = append(args, "-e", "inject="+inject)
	}
	strace := exec.Command("strace", args...)
	stderr, err := strace.StderrPipe()
	require.NoError(p.t, err)
	require.NoError(p.t, strace.Start())
	said, err := bufio.NewReader(stderr).ReadString('\n')
	require.Contains(p.t, said, "attached", "strace -e inject=%s: %v", inject, err)
	_, err = io.WriteString(p.stdin, "live\n")
	require.NoError(p.t, err)
	select {
	case reply, alive := <-p.replies:
		if !alive {
			p.cmd.Wait()
			p.cmd = nil
			problem = "it died: " + firstLines(p.output.String())
		} else if !strings.HasPrefix(reply, "ended") {
			problem = reply
		}
	case <-time.After(testkit.Patience):
		p.cmd.Process.Signal(unix.SIGQUIT)
		strace.Process.Kill() // the program cannot end while strace is attached
		for range p.replies {
		}
		p.cmd.Wait()
		p.cmd = nil
		problem = "it hangs: " + firstLines(p.output.String())
	}
	strace.Process.Signal(os.Interrupt)
	io.Copy(io.Discard, stderr)
	strace.Wait()
	text, err := os.ReadFile(out)
	require.NoError(p.t, err)
	return string(text), problem
}

// firstLines returns the first lines of a crash.
func firstLines(text string) string {
	return strings.Join(strings.SplitN(text, "\n", 40)[:min(39, strings.Count(text, "\n"))], "\n")
}

// liveOnCommand is the program. One thread runs lives and nothing else. The clients and the
// checks run on other threads.
func liveOnCommand(t *testing.T) {
	commands, results, thread := make(chan *life), make(chan bool), make(chan int)
	go func() {
		runtime.LockOSThread()
		thread <- unix.Gettid()
		for l := range commands {
			l.live()
			results <- true
		}
	}()
	reply := func(format string, args ...any) {
		fmt.Println("life: " + strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "))
	}
	testkit.FreeNow("127.0.0.1:0") // package net probes the address families once
	reply("%d", <-thread)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		l := &life{dials: make(chan net.Addr), clients: make(chan net.Conn), hear: make(chan net.Conn), heard: make(chan bool)}
		goroutines, descriptor := runtime.NumGoroutine(), testkit.FreeDescriptor()
		commands <- l
		for alive := true; alive; {
			select {
			case addr := <-l.dials:
				c, err := net.DialTimeout("tcp", addr.String(), 2*time.Second)
				if err != nil {
					c = nil
				}
				l.clients <- c
			case c := <-l.hear:
				c.SetDeadline(time.Now().Add(l.patience()))
				_, err := io.ReadFull(c, make([]byte, 2))
				l.heard <- err == nil
			case <-results:
				alive = false
			}
		}
		for _, addr := range l.addrs {
			if err := testkit.FreeNow(addr); err != nil {
				l.broken(fmt.Errorf("%s: %w", addr, err))
			}
		}
		if !testkit.Eventually(func() bool { return runtime.NumGoroutine() <= goroutines }) {
			l.broken(errors.New("a goroutine is left"))
		}
		if fd := testkit.FreeDescriptor(); fd != descriptor {
			l.broken(fmt.Errorf("descriptor %d was the next one, now it is %d", descriptor, fd))
		}
		if l.failure != nil {
			reply("broken: %v, after %v", l.failure, l.errs)
			continue
		}
		reply("ended, %d steps, %v", l.steps, l.errs)
	}
	close(commands)
}

// A life runs all operations of a server.
type life struct {
	dials   chan net.Addr
	clients chan net.Conn
	hear    chan net.Conn
	heard   chan bool
	addrs   []string
	steps   int
	errs    []error // errors of the expected form
	failure error
}

func (l *life) broken(err error) {
	if l.failure == nil {
		l.failure = err
	}
}

// did records the result of one step and reports whether it succeeded.
func (l *life) did(err error) bool {
	l.steps++
	if err == nil {
		return true
	}
	l.errs = append(l.errs, err)
	op, drained, path := new(net.OpError), new(acceptq.DrainError), new(fs.PathError)
	if !errors.As(err, &op) && !errors.As(err, &drained) && !errors.As(err, &path) { // ReadSystem reads files
		l.broken(fmt.Errorf("not an error of the expected form: %T %w", err, err))
	}
	return false
}

// dial connects a client. It returns nil if that fails.
func (l *life) dial(addr net.Addr) net.Conn {
	l.dials <- addr
	return <-l.clients
}

func (l *life) live() {
	defer func() {
		if p := recover(); p != nil {
			l.broken(fmt.Errorf("panic: %v", p))
		}
	}()
	l.one(":0", acceptq.WithReceiveBuffer(50_000), acceptq.WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: -1}))
	l.one("127.0.0.1:0", acceptq.WithStrictBacklog(), acceptq.WithDeferAccept(time.Second))
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 2, acceptq.WithBacklog(16))
	if l.did(err) {
		l.addrs = append(l.addrs, s.Addr().String())
		_, err := s.Stats()
		l.did(err)
		_, err = s.SetBacklog(9)
		l.did(err)
		l.did(s.Close())
	}
	_, err = acceptq.ReadSystem()
	l.did(err)
}

// one runs the life of one listener.
func (l *life) one(addr string, opts ...acceptq.Option) {
	ln, err := acceptq.Listen(context.Background(), "tcp4", addr, append(opts, acceptq.WithBacklog(16))...)
	if !l.did(err) {
		return
	}
	at := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: ln.Addr().(*net.TCPAddr).Port}
	l.addrs = append(l.addrs, at.String())
	clients := []net.Conn{l.dial(at), l.dial(at)}
	for _, c := range clients {
		if c == nil {
			l.broken(errors.New("a client could not connect"))
			return
		}
		defer c.Close()
		c.Write([]byte("x"))
	}
	_, err = ln.Stats()
	l.did(err)
	_, err = acceptq.ReadStats(ln.TCPListener())
	l.did(err)
	if ln.Backlog().Requested != 16 {
		l.broken(fmt.Errorf("%+v", ln.Backlog()))
	}
	_, err = ln.SetBacklog(32)
	l.did(err)
	if w, err := acceptq.Wrap(ln.TCPListener()); l.did(err) {
		_, err = w.Stats()
		l.did(err)
	}

	l.drain(ln, 1) // this fails: two clients wait
	for _, c := range clients {
		l.serve(ln, c)
	}
	ln.SetDeadline(time.Unix(1, 0)) // so that Accept is called again
	if _, err := ln.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		l.did(err)
	}
	ln.SetDeadline(time.Time{})
	l.drain(ln, 50)
	if f, err := ln.File(); l.did(err) { // File lets new clients in again
		f.Close()
		if c := l.dial(at); c != nil {
			c.Write([]byte("x"))
			l.serve(ln, c)
			c.Close()
		} else if len(l.errs) == 0 {
			l.broken(errors.New("no client can connect after a drain"))
		}
	}
	l.did(ln.Close())
	if _, err := ln.Stats(); !errors.Is(err, net.ErrClosed) {
		l.broken(fmt.Errorf("Stats after Close: %w", err))
	}
}

func (l *life) drain(ln *acceptq.Listener, milliseconds time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), milliseconds*time.Millisecond)
	defer cancel()
	if err := ln.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		l.did(err)
	}
}

// patience is the time limit for a client that must be accepted. A client that net has lost
// through an error in Accept is not waited for.
func (l *life) patience() time.Duration {
	if len(l.errs) > 0 {
		return 100 * time.Millisecond
	}
	return 5 * time.Second
}

// serve accepts a client from the queue and answers it; the client must get the answer. A
// client that could not be accepted must still be in the queue.
func (l *life) serve(ln *acceptq.Listener, client net.Conn) {
	for range 2 {
		ln.SetDeadline(time.Now().Add(l.patience()))
		c, err := ln.Accept()
		if !l.did(err) {
			continue
		}
		c.Write([]byte("ok"))
		l.hear <- client
		heard := <-l.heard
		if !heard && len(l.errs) == 0 { // one of the errors may have come from net in Accept
			l.broken(errors.New("a client that waited was not served"))
		}
		c.Close()
		return
	}
}
