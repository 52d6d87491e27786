package acceptq

import (
	"context"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// anotherProcess returns k as another process has it: with groups of its own.
func anotherProcess(k kernel) *kernel {
	k.groups = new(groups)
	return &k
}

// holding makes k find the names of turns in use by another process.
func holding(k *kernel, what string) (names *atomic.Int64) {
	names = new(atomic.Int64)
	k.reserve = func(fd int, name string) error {
		if strings.HasPrefix(name, "@acceptq/"+what+"/") {
			names.Add(1)
			return unix.EADDRINUSE
		}
		return reserve(fd, name)
	}
	return names
}

// A process that never ends its turn, because it is stopped or hostile, must not keep the
// drains of others from ending, even if they have no deadline.
func TestDrainBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		members := newMembers(t, k, "127.0.0.1:0", 1)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		held := holding(k, "question")
		drained := inBackground(t, l, t.Context())
		awaitStop(t, l)
		newMembers(t, anotherProcess(realKernel), l.Addr().String(), 1) // so the drain asks again
		before := held.Load()
		require.Eventually(t, func() bool { return held.Load() > before }, patience, time.Millisecond)
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() {})
		require.NoError(t, received(t, drained))
	})
}

// Listeners that close beside a process that never ends its turn wait for it once, and not
// once for each listener.
func TestCloseBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		shards, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 16, []Option{WithReusePort()})
		require.NoError(t, err)
		newMembers(t, anotherProcess(realKernel), shards.Addr().String(), 1)
		held := holding(k, "question")
		var waits []int64
		require.NoError(t, shards.Drain(within(t, patience)))
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
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		members := newMembers(t, anotherProcess(realKernel), l.Addr().String(), 1)
		require.NoError(t, l.Drain(within(t, patience)))
		members = append(members, newMembers(t, anotherProcess(realKernel), l.Addr().String(), 1)...)
		k.unixSocket = func() (int, error) { return -1, unix.EMFILE }
		k.clientSocket = func(unix.Sockaddr, int, bool) (int, uint16, error) { return -1, 0, unix.EMFILE }
		require.NoError(t, l.Close())
		requireEven(t, shares(t, members, 200))
	})
}

// A listener that has joined while another one was drained has excluded it from new clients.
// Resume must include it again, although its own drain has attached no program.
func TestResumeAfterAnotherHasJoined(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(realKernel), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(within(t, patience)))
		members = append(members, newMembers(t, anotherProcess(realKernel), members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 200))
	})
}

// Resume and Close at the same time.
func TestResumeDuringClose(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		address := l.Addr().String()
		silent := newMembers(t, anotherProcess(realKernel), address, 1)[0]
		newMembers(t, anotherProcess(realKernel), address, 1)
		silent.steers = false
		require.NoError(t, silent.Drain(within(t, patience)))
		require.NoError(t, l.Drain(within(t, patience)))
		var once sync.Once
		k.disconnect = func(fd int, at unix.Sockaddr) error {
			once.Do(func() { l.Resume() })
			return disconnect(fd, at)
		}
		require.NoError(t, l.Close())
		require.Empty(t, k.groups.all)
	})
}

// A listener is closed at the moment at which its drain joins the steering of its group. The
// steering must forget it. Otherwise the process would hold the turn of its drain for ever.
func TestCloseWhileTheDrainJoins(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		var once sync.Once
		k.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
			rows, err := dump(ctx, r, keep)
			if r.states == 1<<tcpListen {
				once.Do(func() { l.Close() })
			}
			return rows, err
		}
		require.ErrorIs(t, l.Drain(within(t, patience)), net.ErrClosed)
		require.Empty(t, k.groups.all)
		require.NoError(t, members[1].Drain(within(t, patience)))
	})
}

// Resume ends a drain that still waits for the drains of other processes.
func TestResumeWhileADrainBegins(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		held := holding(k, "drain")
		drained := inBackground(t, l, within(t, patience))
		require.Eventually(t, func() bool { return held.Load() > 0 }, patience, time.Millisecond)
		require.NoError(t, l.Resume())
		require.ErrorIs(t, received(t, drained), errResumed)
		require.Nil(t, l.intake.steering.Load())
		require.Empty(t, k.groups.all)
		requireEven(t, shares(t, members, 200))
	})
}

// If Resume cannot let new clients in, they must not be directed to the listener.
func TestFailedResumeKeepsSteering(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		var fails atomic.Bool
		set := k.setsockoptInt
		k.setsockoptInt = func(fd, level, name, value int) error {
			if fails.Load() && name == unix.SO_DETACH_FILTER {
				return unix.EPERM
			}
			return set(fd, level, name, value)
		}
		members := newMembers(t, k, "127.0.0.1:0", 2)
		require.NoError(t, members[0].Drain(within(t, patience)))
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
	inNamespace(t, func(t *testing.T) {
		other := newMembers(t, anotherProcess(realKernel), "127.0.0.1:0", 1, withInt(unix.IPPROTO_IP, unix.IP_TTL, maxTTL))[0]
		l := newMembers(t, anotherProcess(realKernel), other.Addr().String(), 1)[0]
		require.NoError(t, l.Drain(within(t, patience)))
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
	inNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(realKernel), "127.0.0.1:0", 1)
		setSysctl(t, "net.ipv4.ip_default_ttl", maxTTL)
		members = append(members, newMembers(t, anotherProcess(realKernel), members[0].Addr().String(), 1,
			withInt(unix.IPPROTO_IP, unix.IP_MINTTL, maxTTL))...)
		requireEven(t, shares(t, members, 200))
	})
}

// The last listener of a process that drains closes while another one joins. The program for
// the close does not know the newcomer.
func TestJoinWhileTheLastCloses(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := anotherProcess(realKernel)
		members := newMembers(t, anotherProcess(realKernel), "127.0.0.1:0", 1)
		old := newMembers(t, k, members[0].Addr().String(), 1)[0]
		require.NoError(t, old.Drain(within(t, patience)))
		// The next listing in this process is that of the newcomer.
		s := k.groups.of(old.intake.steering.Load().key)
		require.True(t, s.tryLock())
		joining := *k
		var once sync.Once
		joining.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
			rows, err := dump(ctx, r, keep)
			once.Do(func() { // groupOf has asked for the key
				k.groups.forget(s, false, old.intake.steering.Load().inode)
				k.groups.all = map[groupKey]*steering{s.key: s}
				old.tcp.Close()
				s.unlock()
			})
			return rows, err
		}
		members = append(members, newMembers(t, &joining, members[0].Addr().String(), 1)...)
		requireEven(t, shares(t, members, 200))
	})
}

// A listener begins to drain while a question has marked it, because it could not wait longer
// for its turn. The end of the question must not end the drain.
func TestStopDuringAQuestion(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, v4 way) {
		k := anotherProcess(sys)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		_, key, own, err := groupOf(t.Context(), []*Listener{l})
		require.NoError(t, err)
		s := k.groups.join(k, key, own)
		require.True(t, s.tryLock())
		var drained chan error
		k.connect = func(fd int, to unix.Sockaddr) error {
			if drained == nil {
				drained = inBackground(t, l, within(t, patience))
				awaitStop(t, l)
			}
			return unix.Connect(fd, to)
		}
		s.ask(t.Context(), len(members), own)
		s.unlock()
		require.NoError(t, received(t, drained))
		require.Equal(t, v4, wayOf(t, l.raw))
		require.NoError(t, l.Resume())
		require.Equal(t, way{0, 0, -1}, wayOf(t, l.raw))
	})
}

// A listener that joins beside a process that never ends its turn still asks the group.
func TestJoinBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(realKernel), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(within(t, patience)))
		k := anotherProcess(realKernel)
		holding(k, "question")
		members = append(members, newMembers(t, k, members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
	})
}
