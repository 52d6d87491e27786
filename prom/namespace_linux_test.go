package acceptqprom

import (
	"bytes"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const namespaceEnv = "ACCEPTQ_TEST_NAMESPACE"

// inNamespace runs f in a network namespace that is made for this test alone, where its
// counters start at 0 and its sysctls may be set. The test binary is started again for
// that. Without root a user namespace is made too.
func inNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(namespaceEnv) == t.Name() {
		loopbackUp(t)
		f(t)
		return
	}
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=3m")
	cmd.Env = append(os.Environ(), namespaceEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		missing(t, "a namespace cannot be made here: "+err.Error())
	}
	err = cmd.Wait()
	t.Logf("in a namespace of its own:\n%s", &out)
	require.NoError(t, err)
	require.Contains(t, out.String(), "--- PASS: "+t.Name(), "the test did not run in the namespace")
}

// missing ends a test that lacks a program or a privilege. In CI that is a failure.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// program returns the path of a program, which Debian has in a package.
func program(t *testing.T, name, debian string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name+" is not installed: apt-get install "+debian)
	}
	return path
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

func setSomaxconn(t *testing.T, value string) {
	t.Helper()
	require.NotEmpty(t, os.Getenv(namespaceEnv), "only in a namespace of the test's own")
	require.NoError(t, os.WriteFile("/proc/sys/net/core/somaxconn", []byte(value), 0))
}
