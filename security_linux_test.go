package acceptq

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What SECURITY.md says of other parties, where no other test shows it.

// A flood of clients costs a stalled process no descriptor: they are the kernel's
// until Accept, and no more of them than the capacity.
func TestFloodStaysInTheKernel(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(100))
		require.NoError(t, err)
		defer ln.Close()
		before := openDescriptors()
		clients := connectUntilFull(t, ln.Addr(), 1000)
		require.Len(t, clients, 101)
		require.Equal(t, before+len(clients), openDescriptors(), "those of the clients, which are here too")
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, s.Capacity, s.Queued)
	})
}

// executedEnv is set in a program that the test starts to look at what it got.
const executedEnv = "ACCEPTQ_TEST_EXECUTED"

// A program that the process starts holds none of its sockets.
func TestExecutedProgramHoldsNoSocket(t *testing.T) {
	if os.Getenv(executedEnv) != "" {
		for fd := 3; fd < 1024; fd++ {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
				t.Errorf("descriptor %d is a socket", fd)
			}
		}
		return
	}
	s, err := ListenTCPShards("127.0.0.1:0", 3)
	require.NoError(t, err)
	defer s.Close()
	c := dial(t, s.Addr())
	defer c.Close()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^TestExecutedProgramHoldsNoSocket$", "-test.v")
	cmd.Env = append(os.Environ(), executedEnv+"=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestExecutedProgramHoldsNoSocket")
}

// A client that resets while it waits keeps its place, and Accept returns it.
func TestResetWhileQueued(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(5))
	require.NoError(t, err)
	defer ln.Close()
	c := dial(t, ln.Addr())
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, 1, s.Queued)
	accepted := acceptBy(t, ln, ln.Accept)
	_, err = accepted.Read(make([]byte, 1))
	require.ErrorIs(t, err, unix.ECONNRESET)
}

// By the minimum TTL who sends with 255 is let in all through a drain, and served.
func TestDrainLetsTheHighestTTLIn(t *testing.T) {
	sys := realSystem
	sys.attachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
	ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", nil)
	require.NoError(t, err)
	defer ln.Close()
	require.NoError(t, ln.Drain(within(t, patience)))
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, maxTTL) })
		return errors.Join(cerr, err)
	}}
	c, err := d.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	accepted := acceptBy(t, ln, ln.Accept)
	require.Equal(t, c.LocalAddr().String(), accepted.RemoteAddr().String())
	talk(t, c, accepted)
}
