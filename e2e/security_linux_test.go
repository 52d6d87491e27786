package e2e

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/testkit"
)

// Tests of the statements in SECURITY.md that no other test shows.

// comeRaw starts n connections. Each costs this process only a descriptor.
func comeRaw(t *testing.T, ln *acceptq.Listener, n int, opts ...testkit.SocketOption) {
	t.Helper()
	to := &unix.SockaddrInet4{Port: ln.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	var fds []int
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		require.NoError(t, err)
		fds = append(fds, fd)
		for _, o := range opts {
			require.NoError(t, unix.SetsockoptInt(fd, o.Level, o.Name, intake.MaxTTL))
		}
		require.ErrorIs(t, unix.Connect(fd, to), unix.EINPROGRESS)
	}
}

// A flood of clients costs a stalled process no descriptor and no memory. Until Accept the
// kernel holds the connections, up to the capacity.
func TestFloodStaysInTheKernel(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, acceptq.WithBacklog(100))
		const n = 700
		descriptors, heap := testkit.OpenDescriptors(), heapInUse()
		comeRaw(t, ln, n)
		var s acceptq.Stats
		require.True(t, testkit.Eventually(func() bool {
			var err error
			s, err = ln.Stats()
			return err == nil && s.Queued >= s.Capacity
		}))
		require.LessOrEqual(t, s.Queued, s.Capacity+8, "clients that connect at the same moment can exceed the capacity")
		require.Equal(t, descriptors+n, testkit.OpenDescriptors(), "only the descriptors of the clients, which are in this process too")
		require.Less(t, heapInUse()-heap, int64(n*64))
	})
}

// The kernel holds one unfinished handshake more than the limit. With SYN cookies a client
// that finishes its handshake still gets in. Without them it does not.
func TestHalfOpenFlood(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		for _, cookies := range []int{1, 0} {
			testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", cookies)
			ln := listen(t, acceptq.WithBacklog(4))
			comeRaw(t, ln, 50, testkit.SocketOption{Level: unix.IPPROTO_IP, Name: unix.IP_MINTTL}) // they drop the SYN-ACK
			require.True(t, testkit.Eventually(func() bool { return testkit.SynReceived(t, ln.Addr()) >= 4 }))
			require.LessOrEqual(t, testkit.SynReceived(t, ln.Addr()), 5)
			d := net.Dialer{Timeout: testkit.Patience}
			if cookies == 0 {
				d.Timeout = 100 * time.Millisecond
			}
			c, err := d.Dial("tcp", ln.Addr().String())
			if cookies == 0 {
				testkit.RequireDropped(t, err)
				continue
			}
			require.NoError(t, err)
			defer c.Close()
			testkit.Talk(t, c, testkit.AcceptBy(t, ln, ln.Accept))
		}
	})
}

// The kernel holds the data of a queued client, up to the receive buffer.
func TestQueuedClientFillsABuffer(t *testing.T) {
	const size = 50_000
	ln := listen(t, acceptq.WithReceiveBuffer(size))
	c := testkit.Dial(t, ln.Addr())
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	sent, p := 0, make([]byte, 1<<16)
	var err error
	for n := 0; err == nil; sent += n {
		n, err = c.Write(p)
	}
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Greater(t, sent, size/2)
	raw, err := testkit.AcceptBy(t, ln, ln.Accept).SyscallConn()
	require.NoError(t, err)
	held, err := endpoint.RawInt(raw, func(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.SIOCINQ) })
	require.NoError(t, err)
	t.Logf("%d bytes sent, %d held for the server", sent, held)
	require.Positive(t, held)
	require.LessOrEqual(t, held, 2*size)
}

// executedEnv is set in a program that the test starts to check its descriptors.
const executedEnv = "ACCEPTQ_TEST_EXECUTED"

// A program that the process starts inherits none of its sockets.
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
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 3)
	require.NoError(t, err)
	defer s.Close()
	c := testkit.Dial(t, s.Addr())
	defer c.Close()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^TestExecutedProgramHoldsNoSocket$", "-test.v")
	cmd.Env = append(os.Environ(), executedEnv+"=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestExecutedProgramHoldsNoSocket")
}

// A queued connection that its client resets keeps its place, and Accept returns it.
func TestResetWhileQueued(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(5))
	require.NoError(t, err)
	defer ln.Close()
	c := testkit.Dial(t, ln.Addr())
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, 1, s.Queued)
	accepted := testkit.AcceptBy(t, ln, ln.Accept)
	_, err = accepted.Read(make([]byte, 1))
	require.ErrorIs(t, err, unix.ECONNRESET)
}
