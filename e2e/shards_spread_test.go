//go:build dragonfly || freebsd || linux

package e2e

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// childEnv is set in a process that a test starts as another instance. Its value is the
// address.
const childEnv = "ACCEPTQ_TEST_CHILD"

// child returns a command that runs this test in a second process.
func child(t *testing.T, addr string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.timeout=55s")
	cmd.Env = append(os.Environ(), childEnv+"="+addr,
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise it ends a second later under -race
	cmd.Stderr = os.Stderr
	return cmd
}

// otherInstances are the ways in which another program can listen on addr.
func otherInstances(addr string) map[string]func() (io.Closer, error) {
	return map[string]func() (io.Closer, error){
		"net.Listen": func() (io.Closer, error) { return net.Listen("tcp", addr) },
		"plain":      func() (io.Closer, error) { return acceptq.ListenTCP(addr) },
		"one shard":  func() (io.Closer, error) { return acceptq.ListenTCPShards(addr, 1) },
		"sharded":    func() (io.Closer, error) { return acceptq.ListenTCPShards(addr, 3) },
	}
}

// A second instance gets EADDRINUSE, in this process and in another one. It leaves nothing
// behind that would allow a further instance.
func TestShardsAreExclusive(t *testing.T) {
	if addr := os.Getenv(childEnv); addr != "" {
		for name, listen := range otherInstances(addr) {
			if _, err := listen(); err == nil {
				t.Errorf("%s can listen on the same address", name)
			} else {
				require.ErrorIs(t, err, syscall.EADDRINUSE, name)
			}
		}
		return
	}
	testkit.NeedSpread(t)
	s, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
	require.NoError(t, err)
	defer s.Close()
	for range 2 {
		for name, listen := range otherInstances(s.Addr().String()) {
			_, err := listen()
			require.ErrorIs(t, err, syscall.EADDRINUSE, name)
			var op *net.OpError
			require.ErrorAs(t, err, &op, name)
			require.Equal(t, "listen", op.Op, name)
		}
	}
	var out bytes.Buffer
	other := child(t, s.Addr().String())
	other.Stdout = &out
	require.NoError(t, other.Run(), "in another process: %s", &out)
	require.True(t, strings.HasPrefix(out.String(), "PASS"), "%s", &out)
}

// If instances start at the same moment, a maximum of one gets the address.
func TestShardsStartedTogether(t *testing.T) {
	testkit.NeedSpread(t)
	first, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	addr := first.Addr().String()
	require.NoError(t, first.Close())
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	for range rounds {
		var (
			wait  sync.WaitGroup
			start = make(chan struct{})
			got   [4]*acceptq.Shards
			errs  [len(got)]error
		)
		for i := range got {
			wait.Go(func() {
				<-start
				got[i], errs[i] = acceptq.ListenTCPShards(addr, 2)
			})
		}
		close(start)
		wait.Wait()
		won := 0
		for i, s := range got {
			if s != nil {
				won++
				require.NoError(t, s.Close())
			} else {
				require.ErrorIs(t, errs[i], syscall.EADDRINUSE)
			}
		}
		require.LessOrEqual(t, won, 1)
	}
}
