package acceptq

import (
	"encoding/binary"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// anotherProcess returns k as another process has it: with a memory of its own.
func anotherProcess(k sys.Calls) *sys.Calls {
	k.Memory = new(sync.Map)
	return &k
}

// holding makes k find the names of turns in use by another process.
func holding(k *sys.Calls, what string) (names *atomic.Int64) {
	names = new(atomic.Int64)
	k.Reserve = func(fd int, name string) error {
		if strings.HasPrefix(name, "@acceptq/"+what+"/") {
			names.Add(1)
			return unix.EADDRINUSE
		}
		return sys.Real.Reserve(fd, name)
	}
	return names
}

// A process that never ends its turn, because it is stopped or hostile, must not keep the
// drains of others from ending, even if they have no deadline.
func TestDrainBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 1)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		held := holding(k, "question")
		drained := testkit.InBackground(t, l, t.Context())
		awaitStop(t, l)
		newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1) // so the drain asks again
		before := held.Load()
		require.Eventually(t, func() bool { return held.Load() > before }, testkit.Patience, time.Millisecond)
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() {})
		require.NoError(t, testkit.Received(t, drained))
	})
}

// Listeners that close beside a process that never ends its turn wait for it once, and not
// once for each listener.
func TestCloseBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		shards, err := listenShards(k, t.Context(), "tcp4", "127.0.0.1:0", 16, []Option{WithReusePort()})
		require.NoError(t, err)
		newMembers(t, anotherProcess(sys.Real), shards.Addr().String(), 1)
		held := holding(k, "question")
		var waits []int64
		require.NoError(t, shards.Drain(testkit.Within(t, testkit.Patience)))
		for l := range shards.All() {
			before := held.Load()
			require.NoError(t, l.Close())
			if n := held.Load() - before; n > 100 {
				waits = append(waits, n)
			}
		}
		require.LessOrEqual(t, len(waits), 1, "how often each Close that waited has asked for a turn: %v", waits)
	})
}

// The group cannot be asked when a listener closes, because there is no descriptor left. The
// program that it leaves must not exclude a member that has joined since the drain.
func TestCloseWithoutDescriptors(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		members := newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1)
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		members = append(members, newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1)...)
		k.UnixSocket = func() (int, error) { return -1, unix.EMFILE }
		k.ClientSocket = func(unix.Sockaddr, int, bool) (int, uint16, error) { return -1, 0, unix.EMFILE }
		require.NoError(t, l.Close())
		requireEven(t, shares(t, members, 200))
	})
}

// A listener that has joined while another one was drained has excluded it from new clients.
// Resume must include it again, although its own drain has attached no program.
func TestResumeAfterAnotherHasJoined(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		members = append(members, newMembers(t, anotherProcess(sys.Real), members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 200))
	})
}

// Resume and Close at the same time.
func TestResumeDuringClose(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		address := l.Addr().String()
		silent := newMembers(t, anotherProcess(sys.Real), address, 1)[0]
		newMembers(t, anotherProcess(sys.Real), address, 1)
		silent.intake.Steers = false
		require.NoError(t, silent.Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		var once sync.Once
		k.Disconnect = func(fd int, at unix.Sockaddr) error {
			once.Do(func() { l.Resume() })
			return sys.Real.Disconnect(fd, at)
		}
		require.NoError(t, l.Close())
		requireNoTurn(t)
	})
}

// A listener is closed at the moment at which its drain joins the steering of its group. The
// steering must forget it. Otherwise the process would hold the turn of its drain for ever.
func TestCloseWhileTheDrainJoins(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		var once sync.Once
		k.Diag = func(request []byte) (sys.DiagAnswer, error) {
			answer, err := sys.Real.Diag(request)
			if binary.NativeEndian.Uint32(request[unix.SizeofNlMsghdr+4:]) == 1<<tcpinfo.Listen {
				once.Do(func() { l.Close() })
			}
			return answer, err
		}
		require.ErrorIs(t, l.Drain(testkit.Within(t, testkit.Patience)), net.ErrClosed)
		requireNoTurn(t)
		require.NoError(t, members[1].Drain(testkit.Within(t, testkit.Patience)))
	})
}

// Resume ends a drain that still waits for the drains of other processes.
func TestResumeWhileADrainBegins(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		held := holding(k, "drain")
		drained := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
		require.Eventually(t, func() bool { return held.Load() > 0 }, testkit.Patience, time.Millisecond)
		require.NoError(t, l.Resume())
		require.ErrorIs(t, testkit.Received(t, drained), ErrStillOpen)
		require.Nil(t, l.intake.Steering.Load())
		requireNoTurn(t)
		requireEven(t, shares(t, members, 200))
	})
}

// If Resume cannot let new clients in, they must not be directed to the listener.
func TestFailedResumeKeepsSteering(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		var fails atomic.Bool
		set := k.SetsockoptInt
		k.SetsockoptInt = func(fd, level, name, value int) error {
			if fails.Load() && name == unix.SO_DETACH_FILTER {
				return unix.EPERM
			}
			return set(fd, level, name, value)
		}
		members := newMembers(t, k, "127.0.0.1:0", 2)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		fails.Store(true)
		require.ErrorIs(t, members[0].Resume(), unix.EPERM)
		require.Equal(t, []float64{0, 1}, shares(t, members, 40))
		fails.Store(false)
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 200))
	})
}

// A member that sends with a TTL of 255, unlike the listener that asks, must get no connection
// from a question.
func TestQuestionToAMemberWithAnotherTTL(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		other := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1, withInt(unix.IPPROTO_IP, unix.IP_TTL, intake.MaxTTL))[0]
		l := newMembers(t, anotherProcess(sys.Real), other.Addr().String(), 1)[0]
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, l.Close())
		require.NoError(t, ask(other.Addr().String())) // the connections before it were accepted too
		require.EqualValues(t, 1, other.clients.Load())
	})
}

// Members with a minimum TTL of their own (GTSM, RFC 5082) do not answer the question of a
// listener that joins. If it is such a member itself, it must not direct all clients to the
// others.
func TestJoinWithAMinimumTTL(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		testkit.SetSysctl(t, "net.ipv4.ip_default_ttl", intake.MaxTTL)
		members = append(members, newMembers(t, anotherProcess(sys.Real), members[0].Addr().String(), 1,
			withInt(unix.IPPROTO_IP, unix.IP_MINTTL, intake.MaxTTL))...)
		requireEven(t, shares(t, members, 200))
	})
}

// A listener that joins beside a process that never ends its turn still asks the group.
func TestJoinBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		k := anotherProcess(sys.Real)
		holding(k, "question")
		members = append(members, newMembers(t, k, members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
	})
}

// requireNoTurn requires that no process in this namespace has the turn to drain.
func requireNoTurn(t *testing.T) {
	t.Helper()
	names, err := os.ReadFile("/proc/thread-self/net/unix")
	require.NoError(t, err)
	require.NotContains(t, string(names), "@@acceptq/drain/")
	require.NotContains(t, string(names), "@acceptq/drain/")
}
