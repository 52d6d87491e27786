package acceptq

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// namespaceEnv is set in a test that runs in namespaces of its own.
const namespaceEnv = "ACCEPTQ_TEST_NAMESPACE"

// inNamespace runs f in a network and mount namespace that is made for this
// test alone: its counters start at 0, its sysctls may be set, and in it the
// test is root. The test binary is started again for that, so nothing of it
// remains in this process. Without root a user namespace is made too.
func inNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	limit := 10 * time.Minute
	if deadline, ok := t.Deadline(); ok { // a machine may be slow, and has as long as go test gives it
		limit = time.Until(deadline) - 5*time.Second
	}
	inNamespaceFor(t, limit, f)
}

// inNamespaceFor is inNamespace for a test that takes no longer than limit.
func inNamespaceFor(t *testing.T, limit time.Duration, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(namespaceEnv) != "" {
		require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		loopbackUp(t)
		f(t)
		return
	}
	self, err := os.Executable()
	require.NoError(t, err)
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=" + limit.String(), "-test.parallel=16"}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), namespaceEnv+"="+t.Name(),
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // or each one ends a second later under -race
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		skipUnprivileged(t, fmt.Sprintf("a namespace cannot be made here (%v): run as root, or allow unprivileged user namespaces", err))
	}
	err = cmd.Wait()
	t.Logf("in a namespace of its own:\n%s", &out)
	require.NoError(t, err)
	require.Contains(t, out.String(), "--- PASS: "+t.Name(), "the test did not run in the namespace")
}

// skipUnprivileged ends a test that lacks a privilege. In CI that is a failure.
func skipUnprivileged(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func loopbackUp(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	require.NoError(t, err)
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}

// setSysctl sets a sysctl of this test's own namespace.
func setSysctl(t *testing.T, name string, value int) {
	t.Helper()
	require.NotEmpty(t, os.Getenv(namespaceEnv), "only in a namespace of the test's own")
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	require.NoError(t, os.WriteFile(path, []byte(strconv.Itoa(value)), 0))
}

// kernelCounter reads one column of the TcpExt lines of this namespace, in the
// plainest way there is, as the judge of what the library says.
func kernelCounter(t *testing.T, name string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/netstat")
	require.NoError(t, err)
	lines := strings.Split(string(text), "\n")
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	for i := range names {
		if names[i] == name {
			n, err := strconv.ParseInt(values[i], 10, 64)
			require.NoError(t, err)
			return n
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// kernelQueue asks ss(8)'s source, the sock_diag file of the namespace, how many
// connections wait on the listener of addr: the rx_queue column of its row.
func kernelQueue(t *testing.T, addr net.Addr) int {
	t.Helper()
	a := addr.(*net.TCPAddr)
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) > 4 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", a.Port)) {
				_, rx, _ := strings.Cut(f[4], ":")
				n, err := strconv.ParseInt(rx, 16, 64)
				require.NoError(t, err)
				return int(n)
			}
		}
	}
	t.Fatalf("no listener at %v", addr)
	return 0
}

// connectUntilFull connects clients to addr, one at a time, until the kernel
// drops one for a full queue, or until limit clients are in. It returns those
// that are in; the test closes them when it ends.
//
// The kernel's own counter says that the queue is full, not a clock.
func connectUntilFull(t *testing.T, addr net.Addr, limit int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < limit {
		c := connectOne(t, addr)
		if c == nil {
			break
		}
		clients = append(clients, c)
	}
	return clients
}

// connectOne connects one client; nil if the queue of addr is full.
func connectOne(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	before := kernelCounter(t, "ListenOverflows")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan net.Conn, 1)
	go func() {
		c, err := new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
		if err != nil {
			c = nil
		}
		done <- c
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case c := <-done:
			require.NotNil(t, c, "neither connected nor counted as an overflow")
			t.Cleanup(func() { c.Close() })
			return c
		case <-tick.C:
			if kernelCounter(t, "ListenOverflows") > before {
				cancel()
				if c := <-done; c != nil {
					c.Close()
				}
				return nil
			}
		}
	}
}
