package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// start starts the command in a process of its own, as the user with this number.
func start(t *testing.T, uid uint32, args ...string) *exec.Cmd {
	t.Helper()
	// Another user may not enter the folder of the test binary, but may run an open file.
	self, err := os.Open("/proc/self/exe")
	require.NoError(t, err)
	t.Cleanup(func() { self.Close() })
	cmd := exec.Command("/proc/self/fd/3", args...)
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = append(os.Environ(), commandEnv+"=here", "GORACE=atexit_sleep_ms=0")
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return cmd
}

// enter prepares a process that is to be the command.
func enter(place string) {
	if place != "container" {
		return
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, "no /proc of a container here:", err)
		os.Exit(77)
	}
}

// openTerminal opens a terminal of so many columns. It returns the end of a program and that of
// the user.
func openTerminal(t *testing.T, columns uint16) (program, user *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminals here:", err)
	}
	t.Cleanup(func() { user.Close() })
	fd := int(user.Fd())
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	require.NoError(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: columns}))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { program.Close() })
	return program, user
}

// listen listens with a backlog until the test ends.
func listen(t *testing.T, address string, backlog int, opts ...acceptq.Option) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP(address, append(opts, acceptq.WithBacklog(backlog))...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// fill connects clients one by one until the queue is full, and one more, which overflows.
func fill(t *testing.T, ln *acceptq.Listener) []net.Conn {
	t.Helper()
	clients := testkit.ConnectUntilFull(t, ln.Addr(), 1000)
	require.NotEmpty(t, clients)
	return clients
}

// listed runs acceptq -json and returns what it lists, by address.
func listed(t *testing.T, args ...string) map[string]jsonListener {
	t.Helper()
	status, stdout, stderr := command(t, append([]string{"-json"}, args...)...)
	require.Equal(t, statusOK, status, stderr)
	return parseListing(t, stdout)
}

func parseListing(t *testing.T, text string) map[string]jsonListener {
	t.Helper()
	var r jsonReading
	require.NoError(t, json.Unmarshal([]byte(text), &r))
	all := make(map[string]jsonListener)
	for _, l := range r.Listeners {
		all[l.Addr.String()] = l
	}
	return all
}

// readLines returns a function that reads the next line of r that contains a text.
func readLines(t *testing.T, r io.Reader) func(contains string) string {
	t.Helper()
	lines := bufio.NewReader(r)
	return func(contains string) string {
		for {
			line, err := lines.ReadString('\n')
			require.NoError(t, err, "no line with %q", contains)
			if strings.Contains(line, contains) {
				return line
			}
		}
	}
}
