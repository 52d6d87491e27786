package testkit

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// KernelQueues reads the rows of the listeners in /proc/net/tcp and tcp6. It returns the
// number of queued connections of each socket, by inode.
func KernelQueues(t *testing.T) map[uint64]int {
	t.Helper()
	queues := make(map[uint64]int)
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" {
				continue
			}
			_, rx, _ := strings.Cut(f[4], ":")
			n, err := strconv.ParseInt(rx, 16, 64)
			require.NoError(t, err)
			inode, err := strconv.ParseUint(f[9], 10, 64)
			require.NoError(t, err)
			queues[inode] = int(n)
		}
	}
	return queues
}

func AskAll(conns []net.Conn) error {
	errs := make([]error, len(conns))
	Each(len(conns), func(i int) { errs[i] = AskEcho(conns[i]) })
	return errors.Join(errs...)
}
