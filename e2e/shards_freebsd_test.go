package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// Another user cannot join shards on a single address. On a wildcard address another
// user can join them before FreeBSD 15, which fixed this.
func TestJoinShardsAsAnotherUser(t *testing.T) {
	if addr := os.Getenv(childEnv); addr != "" { // this process runs as the other user
		ln, err := acceptq.Listen(t.Context(), "tcp4", addr, acceptq.WithReusePort())
		switch {
		case err == nil:
			ln.Close()
			fmt.Println("joined")
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println("in use")
		default:
			t.Error(err)
		}
		return
	}
	testkit.NeedSpread(t)
	joins := func(addr string) bool {
		var out bytes.Buffer
		other := child(t, addr)
		other.Stdout = &out
		other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		err := other.Start()
		if errors.Is(err, syscall.EACCES) {
			t.Skipf("uid 65534 may not execute %s: copy this binary to where it may", other.Path)
		}
		require.NoError(t, err)
		require.NoError(t, other.Wait(), "%s", &out)
		joined := strings.HasPrefix(out.String(), "joined")
		require.True(t, joined || strings.HasPrefix(out.String(), "in use"), "%s", &out)
		return joined
	}
	one, err := acceptq.ListenShards(t.Context(), "tcp4", "127.0.0.1:0", 2)
	require.NoError(t, err)
	defer one.Close()
	same, err := acceptq.ListenTCP(one.Addr().String(), acceptq.WithReusePort())
	require.NoError(t, err, "the same user can join")
	require.NoError(t, same.Close())
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user: run this test as root")
	}
	require.False(t, joins(one.Addr().String()))

	if jailed, err := unix.SysctlUint32("security.jail.jailed"); err == nil && jailed == 1 {
		t.Skip("in a jail the wildcard can mean a single address: run this test outside of it")
	}
	all, err := acceptq.ListenShards(t.Context(), "tcp4", "0.0.0.0:0", 2)
	require.NoError(t, err)
	defer all.Close()
	joined := joins(all.Addr().String())
	release, err := unix.SysctlUint32("kern.osreldate")
	require.NoError(t, err)
	switch {
	case release < 1303000, release >= 1400097 && release <= 1400507:
		require.True(t, joined, "SECURITY.md says that another user can join")
	case release >= 1500068:
		require.False(t, joined, "SECURITY.md says that another user cannot join")
	default:
		t.Logf("%d: joined: %t; no other release of this branch has been tried", release, joined)
	}
}
