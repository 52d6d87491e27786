package observe

import (
	"bufio"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inodeOf returns the inode of a socket.
func inodeOf(t *testing.T, c syscall.Conn) uint64 {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	var s unix.Stat_t
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &s) }))
	require.NoError(t, err)
	return s.Ino
}

// childEnv is set in a process that only holds the descriptors that it has inherited.
const childEnv = "ACCEPTQ_TEST_HOLDER"

// A socket with two holders has both, a closed one has none, and the numbers of Queues are
// those that Processes takes.
func TestProcesses(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		os.Stdout.WriteString("here\n")
		bufio.NewReader(os.Stdin).ReadByte()
		return
	}
	one, two, closed := listen(t), listen(t), listen(t)
	gone := inodeOf(t, closed)
	require.NoError(t, closed.Close())
	copied, err := two.File()
	require.NoError(t, err)
	defer copied.Close()
	self, err := os.Executable()
	require.NoError(t, err)
	child := exec.Command(self, "-test.run=^TestProcesses$")
	child.Env = append(os.Environ(), childEnv+"=1")
	child.ExtraFiles = []*os.File{copied, copied}
	in, err := child.StdinPipe()
	require.NoError(t, err)
	out, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	defer func() {
		in.Close()
		require.NoError(t, child.Wait())
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "here\n", line)

	queues, err := acceptq.Queues(t.Context())
	require.NoError(t, err)
	at := slices.IndexFunc(queues, func(q acceptq.Queue) bool { return q.Addr.String() == one.Addr().String() })
	require.Equal(t, inodeOf(t, one), queues[at].Inode)

	holders, _, err := Processes(t.Context(), inodeOf(t, one), inodeOf(t, two), gone, 0)
	require.NoError(t, err)
	own := Process{os.Getpid(), name(os.Getpid())}
	require.NotEmpty(t, own.Name)
	require.True(t, strings.HasPrefix(filepath.Base(self), own.Name), own.Name)
	both := []Process{own, {child.Process.Pid, own.Name}}
	slices.SortFunc(both, func(a, b Process) int { return a.PID - b.PID })
	require.Equal(t, map[uint64][]Process{inodeOf(t, one): {own}, inodeOf(t, two): both}, holders)

	holders, complete, err := Processes(t.Context())
	require.NoError(t, err)
	require.True(t, complete)
	require.Empty(t, holders)

	ended, end := context.WithCancel(t.Context())
	end()
	_, complete, err = Processes(ended, gone)
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, complete)
}

// A user who may not read all processes is told so, and still gets its own.
func TestProcessesOfOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("to act as another user the test must run as root")
	}
	ln := listen(t)
	other := exec.Command("/proc/self/exe", "-test.run=^TestProcesses$")
	other.Env = append(os.Environ(), childEnv+"=1")
	in, err := other.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, other.Start()) // a process of root
	defer func() {
		in.Close()
		require.NoError(t, other.Wait())
	}()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its user
		unix.Setfsuid(65534)
		holders, complete, err := Processes(context.Background(), inodeOf(t, ln))
		if err != nil || complete || len(holders[inodeOf(t, ln)]) != 1 {
			t.Error(holders, complete, err)
		}
	}()
	<-done
}

// Without a descriptor left the holders are unknown, which is an error.
func TestProcessesWithoutADescriptor(t *testing.T) {
	s := scan{complete: true}
	require.ErrorIs(t, s.refused("open", unix.EMFILE), unix.EMFILE)
	require.NoError(t, s.refused("open", unix.ESRCH))
	require.True(t, s.complete)
	require.NoError(t, s.refused("open", unix.EACCES))
	require.False(t, s.complete)
}

func TestSocketLink(t *testing.T) {
	for link, want := range map[string]uint64{
		"socket:[1]": 1, "socket:[18446744073709551615]": 0, "socket:[4294967295]": 1<<32 - 1,
		"socket:[]": 0, "socket:[": 0, "socket:[-1]": 0, "socket:[1": 0, "socket:[1]x": 0, "pipe:[1]": 0, "/socket:[1]": 0, "": 0,
	} {
		inode, ok := socketLink([]byte(link))
		require.Equal(t, want != 0, ok, link)
		require.Equal(t, want, inode, link)
	}
}

func entry(name string) []byte {
	size := (19 + len(name) + 1 + 7) &^ 7
	p := make([]byte, size)
	binary.NativeEndian.PutUint16(p[16:], uint16(size))
	copy(p[19:], name)
	return p
}

func TestDirectoryNumbers(t *testing.T) {
	var p []byte
	for _, name := range []string{".", "..", "0", "17", "self", "1x", "4294967296", "2147483647"} {
		p = append(p, entry(name)...)
	}
	require.Equal(t, []int{9, 0, 17, 1<<31 - 1}, directoryNumbers(p, []int{9}))
	require.Equal(t, []int{0}, directoryNumbers(p[:len(entry("."))*3+20], nil), "an entry that is cut off")
}

func FuzzSocketLink(f *testing.F) {
	f.Add([]byte("socket:[4711]"))
	f.Add([]byte("/dev/null"))
	f.Fuzz(func(t *testing.T, link []byte) {
		if _, ok := socketLink(link); ok && (len(link) < len("socket:[1]") || link[len(link)-1] != ']') {
			t.Fatalf("%q", link)
		}
	})
}

func FuzzDirectoryNumbers(f *testing.F) {
	f.Add(append(entry("17"), entry(".")...))
	f.Add(make([]byte, 24))
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, n := range directoryNumbers(p, nil) {
			if n < 0 || n > 1<<31-1 {
				t.Fatal(n)
			}
		}
	})
}
