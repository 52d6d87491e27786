package testkit

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A visited is a network namespace with a thread of this test in it, which runs functions
// there.
type visited struct{ do chan func() }

// NewVisited creates a network namespace in which lo is up.
func NewVisited(t *testing.T) *visited {
	t.Helper()
	v := &visited{do: make(chan func())}
	made := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range v.do {
			f()
		}
	}()
	t.Cleanup(func() { close(v.do); <-ended })
	require.NoError(t, <-made)
	v.In(func() { LoopbackUp(t) })
	return v
}

func (v *visited) In(f func()) {
	done := make(chan struct{})
	v.do <- func() { defer close(done); f() }
	<-done
}

// InNamespace runs f in a new network and mount namespace: its counters start at 0, the
// test may set its sysctls, and the test is root there. It starts the test binary again for
// that, so this process does not change. Without root it also creates a user namespace.
func InNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	limit := 10 * time.Minute
	if deadline, ok := t.Deadline(); ok { // a slow machine may use all the time that go test gives it
		limit = time.Until(deadline) - 5*time.Second
	}
	InNamespaceFor(t, limit, f)
}

// InNamespaceFor is like InNamespace, with a time limit.
func InNamespaceFor(t *testing.T, limit time.Duration, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(NamespaceEnv) != "" {
		require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		LoopbackUp(t)
		f(t)
		return
	}
	self, err := os.Executable()
	require.NoError(t, err)
	name := "^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$"
	args := []string{"-test.run=" + name, "-test.v", "-test.timeout=" + limit.String(), "-test.parallel=16"}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), NamespaceEnv+"="+t.Name(),
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise each process ends a second later under -race
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		SkipUnprivileged(t, fmt.Sprintf("a namespace cannot be made here (%v): run as root, or allow unprivileged user namespaces", err))
	}
	err = cmd.Wait()
	t.Logf("in its own namespace:\n%s", &out)
	require.NoError(t, err)
	require.Contains(t, out.String(), "--- PASS: "+t.Name(), "the test did not run in the namespace")
}

// SkipUnprivileged skips a test that lacks a privilege. In CI it fails the test.
func SkipUnprivileged(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// LoopbackUp sets the loopback interface of this network namespace up.
func LoopbackUp(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	require.NoError(t, err)
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}

// SetSysctl sets a sysctl in the namespace of this test.
func SetSysctl(t *testing.T, name string, value int) {
	t.Helper()
	require.NotEmpty(t, os.Getenv(NamespaceEnv), "setSysctl may only run in a namespace of the test")
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	require.NoError(t, os.WriteFile(path, []byte(strconv.Itoa(value)), 0))
}
