//go:build unix

package interop

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// helperEnv is set when this test binary runs as a helper process, which inherits a
// listener. Its value is the name of the helper.
const helperEnv = "ACCEPTQ_TEST_HELPER"

// Files for a single system add their own helpers.
var helpers = map[string]func() error{
	"activation": activationHelper,
	"tableflip":  tableflipHelper,
}

func TestMain(m *testing.M) {
	if helper, ok := helpers[os.Getenv(helperEnv)]; ok {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, os.Getenv(helperEnv), "helper:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// patience is the time limit for every wait for another process.
const patience = 20 * time.Second

// newListeners are the two ways to open the listener that is passed on. With net.Listen
// it is MPTCP if the kernel has it.
var newListeners = map[string]func() (net.Listener, error){
	"acceptq": func() (net.Listener, error) {
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(5))
		if err != nil {
			return nil, err // not a nil pointer in a non-nil interface
		}
		return ln, nil
	},
	"net": func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") },
}

// numbers is Stats without its JSON methods, which encode an unknown number as null.
type numbers acceptq.Stats

// A report is what a helper writes to its standard output.
type report struct {
	Who       string
	Addr      string
	Inherited *numbers // the queue of the inherited listener
	Resized   *numbers // after SetBacklog(9)
	Served    int      // clients that were answered
	Done      bool
}

func (r report) send() error { return json.NewEncoder(os.Stdout).Encode(r) }

// adopt wraps an inherited listener, reads its queue and lengthens it.
func adopt(who string, inherited net.Listener) (*acceptq.Listener, error) {
	ln, err := acceptq.Wrap(inherited)
	if err != nil {
		return nil, err
	}
	if err := ln.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	before, err := ln.Stats()
	if err != nil {
		return nil, err
	}
	if _, err := ln.SetBacklog(9); err != nil {
		return nil, err
	}
	after, err := ln.Stats()
	if err != nil {
		return nil, err
	}
	return ln, report{Who: who, Addr: ln.Addr().String(), Inherited: (*numbers)(&before), Resized: (*numbers)(&after)}.send()
}

// serve answers n clients with a name.
func serve(ln net.Listener, n int, name string) error {
	for range n {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		_, err = io.WriteString(c, name)
		if cerr := c.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// helperCommand is this binary as a helper.
func helperCommand(t *testing.T, name string, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), helperEnv+"="+name,
		"GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0") // otherwise each ends a second later
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// reports reads the reports of helpers, one line at a time.
type reports struct {
	lines *bufio.Scanner
}

func (r reports) next(t *testing.T) (got report) {
	t.Helper()
	require.True(t, r.lines.Scan(), "a helper ended early")
	return r.last(t)
}

// last is the line that was read last.
func (r reports) last(t *testing.T) (got report) {
	t.Helper()
	require.NoError(t, json.Unmarshal(r.lines.Bytes(), &got), "%s", r.lines.Bytes())
	return got
}

func (r reports) end(t *testing.T) {
	t.Helper()
	require.False(t, r.lines.Scan(), "%s", r.lines.Bytes())
	require.NoError(t, r.lines.Err())
}

func connect(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	require.NoError(t, err)
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	t.Cleanup(func() { c.Close() })
	return c
}

// answer is the name with which a client was answered.
func answer(t *testing.T, c net.Conn) string {
	t.Helper()
	name, err := io.ReadAll(c)
	require.NoError(t, err)
	return string(name)
}

// requireInherited compares the report of a helper with the known state of the queue.
func requireInherited(t *testing.T, r report, queued int, multipath bool) {
	t.Helper()
	require.NotNil(t, r.Inherited)
	require.NotNil(t, r.Resized)
	require.Equal(t, queued, r.Inherited.Queued, "the queue belongs to the socket")
	require.Equal(t, queued, r.Resized.Queued)
	require.Equal(t, 9, r.Resized.Limit)
	if runtime.GOOS == "linux" {
		drops := int64(0)
		if multipath {
			drops = -1
		}
		require.Equal(t, drops, r.Inherited.Drops)
	}
}

// isMultipath reports whether the socket of ln is MPTCP.
func isMultipath(t *testing.T, ln syscall.Conn) (multipath bool) {
	t.Helper()
	if runtime.GOOS != "linux" {
		return false
	}
	const soProtocol, ipprotoMPTCP = 0x26, 262
	onDescriptor(t, ln, func(fd int) error {
		proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, soProtocol)
		multipath = proto == ipprotoMPTCP
		return err
	})
	return multipath
}

func onDescriptor(t *testing.T, c syscall.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = f(int(fd)) }))
	require.NoError(t, err)
}

// drainShared drains a socket that another process holds too. ErrStillOpen is not a failure
// there: the other process serves the new clients.
func drainShared(ctx context.Context, ln *acceptq.Listener) error {
	err := ln.Drain(ctx)
	var incomplete *acceptq.DrainError
	if errors.Is(err, acceptq.ErrStillOpen) && !errors.As(err, &incomplete) {
		return nil
	}
	return err
}

// need returns the path of a program of a Debian package. In CI the test fails if the
// program is missing.
func need(t *testing.T, program, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + program) // not every user has it in PATH
	}
	if err != nil {
		why := fmt.Sprintf("no %s on PATH: apt-get install %s", program, debianPackage)
		if os.Getenv("CI") != "" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	return path
}

// duplicate returns a copy of the socket of c for a child process. With the file of
// File, os/exec would make the socket of the listener blocking.
func duplicate(t *testing.T, c syscall.Conn) (f *os.File) {
	t.Helper()
	onDescriptor(t, c, func(fd int) error {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			f = os.NewFile(uintptr(fd), "socket")
		}
		return err
	})
	t.Cleanup(func() { f.Close() })
	return f
}

// until waits for a condition.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatal("timeout while waiting for ", what)
		}
		<-time.After(time.Millisecond)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// get makes one HTTP request on a new connection.
func get(addr string) error {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	return getOver(c)
}

// getOver makes one HTTP request on c and closes it.
func getOver(c net.Conn) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || string(body) != "served") {
		err = fmt.Errorf("status %s, %q", resp.Status, body)
	}
	return err
}
