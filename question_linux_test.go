package acceptq

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// shuffledGroup returns n members of a new group whose order in the kernel is random.
func shuffledGroup(t *testing.T, network, address string, n int) (members []*Listener) {
	t.Helper()
	join := func() *Listener {
		l, err := Listen(t.Context(), network, address, WithReusePort(), WithoutSteering(), WithBacklog(64))
		require.NoError(t, err)
		address = net.JoinHostPort(addressHost(address), strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
		return l
	}
	for range n {
		members = append(members, join())
	}
	for range 2 * n {
		i := rand.IntN(n)
		if n > 1 {
			require.NoError(t, members[i].Close())
		}
		if n > 1 {
			members[i] = join()
		}
	}
	t.Cleanup(func() {
		for _, l := range members {
			l.Close()
		}
	})
	return members
}

func addressHost(address string) string {
	host, _, _ := net.SplitHostPort(address)
	return host
}

// indexOf returns the index of a member: a program sends a client there. dial is a host.
func indexOf(t *testing.T, members []*Listener, l *Listener, dial string) int {
	t.Helper()
	to := net.JoinHostPort(dial, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	for i := range members {
		require.NoError(t, realKernel.attachTo(l.intake.raw, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(i)}}))
		c, err := net.DialTimeout("tcp", to, patience)
		require.NoError(t, err)
		for _, m := range members {
			s, err := m.Stats()
			require.NoError(t, err)
			if s.Queued == 0 {
				continue
			}
			a, err := m.Accept()
			require.NoError(t, err)
			require.Equal(t, c.LocalAddr().String(), a.RemoteAddr().String())
			a.Close()
			if m == l {
				c.Close()
				return i
			}
		}
		c.Close()
	}
	t.Fatal("no index leads to the listener")
	return -1
}

// A question finds all members that answer, and only these, whatever the order of the group.
// It leaves nothing behind: no connection, no half-open handshake, no option.
func TestQuestion(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		for _, row := range []struct{ name, network, address, dial string }{
			{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
			{"IPv4 wildcard", "tcp4", "0.0.0.0:0", "127.0.0.1"},
			{"IPv6", "tcp6", "[::1]:0", "::1"},
			{"IPv6 wildcard", "tcp6", "[::]:0", "::1"},
			{"both families", "tcp", "[::]:0", "127.0.0.1"},
		} {
			for _, n := range []int{2, 3, 8, 70} {
				t.Run(fmt.Sprintf("%s, %d members", row.name, n), func(t *testing.T) {
					for range rounds(3) {
						members := shuffledGroup(t, row.network, row.address, n)
						own := members[rand.IntN(n)]
						index := indexOf(t, members, own, row.dial)
						want := []int{}
						for i := range n {
							if i != index {
								want = append(want, i)
							}
						}
						own.intake.steers = true
						k, key, as, err := groupOf(t.Context(), intakes([]*Listener{own}))
						require.NoError(t, err)
						s := &steering{kernel: k, groups: new(groups), key: key, own: as}
						former := wayOf(t, own.intake.raw)
						began := time.Now()
						answers, err := s.ask(t.Context(), n, as)
						t.Logf("%d members: %v", n, time.Since(began))
						require.NoError(t, err)
						require.Equal(t, want, answers)
						require.Equal(t, former, wayOf(t, own.intake.raw))
						require.Zero(t, synReceived(t, own.Addr()))
						for _, m := range members {
							stats, err := m.Stats()
							require.NoError(t, err)
							require.Zero(t, stats.Queued)
						}
						if n < 3 {
							continue
						}
						// A member that drains is silent. So is one whose queue is full.
						other := members[(slices.Index(members, own)+1)%n]
						silent := indexOf(t, members, other, row.dial)
						(&draining{l: &other.intake}).begin(false)
						answers, err = s.ask(t.Context(), n, as)
						require.NoError(t, err)
						require.Equal(t, slices.DeleteFunc(slices.Clone(want), func(i int) bool { return i == silent }), answers)
					}
				})
			}
		}
	})
}
