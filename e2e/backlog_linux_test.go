package e2e

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// For every ceiling and request, Backlog, the numbers of the kernel and the measured
// capacity agree.
func TestBacklogMatchesTheKernel(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		requests := []int{math.MinInt, -1, 0, 1, 2, 127, 128, 129, 4096, 65536, 196602, math.MaxInt32, math.MaxInt}
		if strconv.IntSize == 64 {
			one := 1
			requests = append(requests, one<<32, one<<32+1) // 0 and 1 in the 32 bits of listen(2)
		}
		for _, ceiling := range []int{1, 3, 128, 4096, 196602} {
			testkit.SetSysctl(t, "net.core.somaxconn", ceiling)
			for _, n := range requests {
				t.Run(fmt.Sprintf("somaxconn %d, request %d", ceiling, n), func(t *testing.T) {
					ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(n))
					require.NoError(t, err)
					defer ln.Close()

					want := n
					if n < 0 || n > ceiling {
						want = ceiling
					}
					require.Equal(t, acceptq.Backlog{
						Requested: max(n, -1), Ceiling: ceiling, Limit: want,
						Effective: want, Capacity: want + 1, Measured: true,
					}, ln.Backlog())
					require.Equal(t, want, ln.EffectiveBacklog())
					require.Equal(t, n > ceiling, ln.Backlog().Clamped())

					if want <= 3 {
						require.Len(t, testkit.ConnectUntilFull(t, ln.Addr(), want+10), want+1, "measured capacity")
						require.Equal(t, want+1, testkit.KernelQueue(t, ln.Addr()))
					}
				})
			}
		}
	})
}

// A changed ceiling affects the next call of Backlog and the next listen. A listening
// socket keeps its limit.
func TestCeilingChangesAfterListen(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 2)
		testkit.FreeAgain(t, "tcp", "127.0.0.1:0") // from here on net.Listen uses the ceiling that it has read
		first, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(100))
		require.NoError(t, err)
		defer first.Close()

		for _, ceiling := range []int{100, 1, 1000} {
			testkit.SetSysctl(t, "net.core.somaxconn", ceiling)
			require.Equal(t, acceptq.Backlog{
				Requested: 100, Ceiling: ceiling, Limit: 2, Effective: 2, Capacity: 3, Measured: true,
			}, first.Backlog())
			require.Equal(t, 2, first.EffectiveBacklog())

			for n, want := range map[int]int{100: min(100, ceiling), -1: ceiling} {
				next, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(n))
				require.NoError(t, err)
				require.NoError(t, next.Close())
				require.Equal(t, want, next.EffectiveBacklog())
			}
		}
		require.Contains(t, first.Backlog().String(), "net.core.somaxconn is 1000 now: SetBacklog(100) grows the queue")
		require.Len(t, testkit.ConnectUntilFull(t, first.Addr(), 10), 3, "measured capacity")
	})
}

// The limit comes from the socket, whatever the sysctl file says and even without it.
func TestLimitComesFromTheSocket(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 2)
		lie := func(text string) func(t *testing.T) string {
			return func(t *testing.T) string {
				file := filepath.Join(t.TempDir(), "somaxconn")
				require.NoError(t, os.WriteFile(file, []byte(text), 0o644))
				require.NoError(t, unix.Mount(file, "/proc/sys/net/core/somaxconn", "", unix.MS_BIND, ""))
				return "/proc/sys/net/core/somaxconn"
			}
		}
		empty := func(dir string) func(t *testing.T) string {
			return func(t *testing.T) string {
				require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
				return dir
			}
		}
		for _, tc := range []struct {
			name    string
			mount   func(t *testing.T) string
			ceiling int
		}{
			{"the file has a larger number", lie("4096\n"), 4096},
			{"the file has a smaller number", lie("1\n"), 1},
			{"the file is empty", lie(""), -1},
			{"the file has no number", lie("unlimited\n"), -1},
			{"no /proc/sys", empty("/proc/sys"), -1},
			{"no /proc", empty("/proc"), -1},
		} {
			t.Run(tc.name, func(t *testing.T) {
				target := tc.mount(t)
				ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(100))
				account := acceptq.Backlog{}
				if err == nil {
					defer ln.Close()
					account = ln.Backlog()
				}
				require.NoError(t, unix.Unmount(target, 0))
				require.NoError(t, err)
				require.Equal(t, acceptq.Backlog{
					Requested: 100, Ceiling: tc.ceiling, Limit: 2, Effective: 2, Capacity: 3, Measured: true,
				}, account)
				require.Len(t, testkit.ConnectUntilFull(t, ln.Addr(), 10), 3, "measured capacity")
			})
		}
	})
}

// Many tests are skipped if IPv6 or MPTCP does not work. In CI that is only acceptable
// if the kernel is built without it. If it is only switched off, this test fails.
func TestIPv6AndMultipathTCPAreOn(t *testing.T) {
	check := func(t *testing.T) {
		for _, tt := range []struct {
			name             string
			family, protocol int
			loopback         unix.Sockaddr
			none             unix.Errno // the error of a kernel that is built without it
		}{
			{"IPv6", unix.AF_INET6, unix.IPPROTO_TCP, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}, unix.EAFNOSUPPORT},
			{"MPTCP", unix.AF_INET, unix.IPPROTO_MPTCP, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, unix.EPROTONOSUPPORT},
		} {
			fd, err := unix.Socket(tt.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, tt.protocol)
			if err == nil {
				err = unix.Bind(fd, tt.loopback)
				unix.Close(fd)
			}
			switch {
			case err == tt.none:
				t.Logf("this kernel has no %s", tt.name)
			case err != nil:
				testkit.SkipUnprivileged(t, fmt.Sprintf("%s is switched off: %v", tt.name, err))
			}
		}
	}
	t.Run("here", check)
	t.Run("in a namespace", func(t *testing.T) { testkit.InNamespace(t, check) })
}
