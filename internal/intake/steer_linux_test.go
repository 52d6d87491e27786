package intake

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// run interprets a BPF program made by steering, for every possible random number, and
// counts the results.
func run(t *testing.T, p []unix.SockFilter) map[uint32]int {
	t.Helper()
	results := map[uint32]int{}
	for draw := range uint32(5040) { // divisible by 1 to 10
		var a uint32
		for pc := 0; ; pc++ {
			switch i := p[pc]; i.Code {
			case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
				require.Equal(t, BpfRandom, i.K)
				a = draw
			case unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K:
				a %= i.K
			case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
				if a >= i.K {
					pc += int(i.Jt)
				} else {
					pc += int(i.Jf)
				}
				continue
			case unix.BPF_ALU | unix.BPF_ADD | unix.BPF_K:
				a += i.K
				continue
			case unix.BPF_RET | unix.BPF_A:
				results[a]++
			case unix.BPF_RET | unix.BPF_K:
				results[i.K]++
			default:
				t.Fatalf("instruction %+v", i)
			}
			if p[pc].Code&7 == unix.BPF_RET {
				break
			}
		}
	}
	return results
}

// Every member has the same share, except the excluded ones, which have none.
func TestProgramPicksAllExceptTheExcluded(t *testing.T) {
	for n := 1; n <= min(6+testkit.Factor(), 10); n++ {
		for set := range 1 << n {
			var excluded, left []int
			for i := range n {
				if set>>i&1 != 0 {
					excluded = append(excluded, i)
				} else {
					left = append(left, i)
				}
			}
			rand.Shuffle(len(excluded), func(i, j int) { excluded[i], excluded[j] = excluded[j], excluded[i] })
			p := Program(n, excluded)
			if len(left) == 0 {
				require.Nil(t, p)
				continue
			}
			want := map[uint32]int{}
			for _, i := range left {
				want[uint32(i)] = 5040 / len(left)
			}
			require.Equal(t, want, run(t, p), "%d members but %v", n, excluded)
		}
	}
	many := make([]int, 2046)
	for i := range many {
		many[i] = i
	}
	require.Len(t, Program(4096, many), 4095, "the kernel takes 4096")
	require.Nil(t, Program(4096, append(many, 2046)))
}

// When a member closes, the last one takes its place. The next question leads all other
// clients to members that answer, unless the last was the one that drains.
func TestOtherClientsOfAQuestion(t *testing.T) {
	for n := 3; n <= 6; n++ {
		for drains := range n - 1 {
			for closes := range n {
				if closes == drains {
					continue
				}
				s := &Steering{listed: make([]uint32, n)}
				array := make([]int, n) // of the members, by what they were before
				for i := range array {
					array[i] = i
					if i != drains {
						s.answers = append(s.answers, i)
					}
				}
				require.Equal(t, only(n-1), s.rest(n), "nothing is known yet")
				s.program = picks(s.answers, n)
				require.Equal(t, s.program, s.rest(n))
				require.Equal(t, s.program, s.rest(n+1), "one has joined")
				array[closes] = array[n-1]
				array = array[:n-1]
				for index := range run(t, s.rest(n-1)) {
					require.Less(t, int(index), len(array), "the kernel would use its hash")
					require.NotEqual(t, drains, array[index])
				}
			}
		}
	}
}

// The program for a close picks no listener that drains, whatever the order of the group and
// of the closes is, as long as it promises to be right.
func TestProgramIsRightWhileListenersClose(t *testing.T) {
	const drains, other, serves = 0, 1, 2
	for range 100 * testkit.Factor() {
		n := 1 + rand.IntN(12)
		array := make([]int, n)
		for i := range array {
			array[i] = rand.IntN(3)
		}
		array[rand.IntN(n)] = drains
		count := func(kind int) (c int) {
			for _, a := range array {
				if a == kind {
					c++
				}
			}
			return c
		}
		var answers []int
		for i, a := range array {
			if a == serves {
				answers = append(answers, i)
			}
		}
		own, silent := count(drains), count(other)
		if len(answers) == 0 {
			continue
		}
		what := fmt.Sprint(array)
		p, spare, moves := closing(n, answers, own, 0)
		for target := range run(t, p) {
			require.Equal(t, serves, array[target], what)
		}
		require.Equal(t, moves, len(answers) == 1 && answers[0] == n-1 && (own > 1 || silent > 0), what)
		if moves {
			continue
		}
		closes := max(spare, 1)
		require.LessOrEqual(t, closes, own, what)
		for range closes {
			var mine []int
			for i, a := range array {
				if a == drains {
					mine = append(mine, i)
				}
			}
			i := mine[rand.IntN(len(mine))]
			array[i] = array[len(array)-1]
			array = array[:len(array)-1]
			for target := range run(t, p) {
				if int(target) < len(array) {
					require.Equal(t, serves, array[target], "%s after a close: %v", what, array)
				} else { // the hash picks any member
					require.False(t, slices.ContainsFunc(array, func(a int) bool { return a != serves }), "%s after a close: %v", what, array)
				}
			}
		}
	}
}

// A serving is a listener that accepts and closes connections.
type serving struct {
	Intake
	clients atomic.Int64
}

// newServing makes a member of a SO_REUSEPORT group.
func newServing(t *testing.T, k *sys.Calls, address string) *serving {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp4", address)
	require.NoError(t, err)
	raw, err := ln.(*net.TCPListener).SyscallConn()
	require.NoError(t, err)
	s := new(serving)
	s.Init(k, ln.(*net.TCPListener), raw, false, func() (Queue, error) { return Queue{0, sys.Unknown, 128, 129}, nil })
	s.ReusePort, s.Steers = true, true
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.clients.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return s
}

// When Close has bound the socket to no interface, a copy of it would be useless, so there is
// none.
func TestNoCopyOfAHiddenSocket(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		old := newServing(t, &sys.Real, "127.0.0.1:0")
		require.NoError(t, Drain(testkit.Within(t, testkit.Patience), []*Intake{&old.Intake}, func(l Left) error { return l.Err }))
		hide(&old.Intake)
		require.True(t, old.hidden)
		require.ErrorIs(t, old.MarkShared(), net.ErrClosed)
	})
}

// The last listener of a process that drains closes while another one joins. The program for
// the close does not know the newcomer.
func TestJoinWhileTheLastCloses(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := sys.Real
		k.Memory = new(sync.Map)
		stays := newServing(t, &sys.Real, "127.0.0.1:0")
		address := stays.TCP.Addr().String()
		old := newServing(t, &k, address)
		require.NoError(t, Drain(testkit.Within(t, testkit.Patience), []*Intake{&old.Intake}, func(l Left) error { return l.Err }))
		// The next listing in this process is that of the newcomer.
		at := old.Steering.Load()
		s := at.Steering
		require.True(t, s.tryLock())
		joining := k
		var once sync.Once
		joining.Diag = func(request []byte) (sys.DiagAnswer, error) {
			answer, err := sys.Real.Diag(request)
			once.Do(func() { // GroupOf asks for the key
				s.Groups.forget(s, false, at.inode)
				s.Groups.all = map[groupKey]*Steering{s.Key: s}
				old.TCP.Close()
				s.unlock()
			})
			return answer, err
		}
		newcomer := newServing(t, &joining, address)
		Welcome(t.Context(), []*Intake{&newcomer.Intake})
		for range 200 {
			c, err := net.Dial("tcp", address)
			require.NoError(t, err)
			c.Close()
		}
		require.Eventually(t, func() bool { return stays.clients.Load()+newcomer.clients.Load() == 200 }, testkit.Patience, time.Millisecond)
		require.InDelta(t, 100, newcomer.clients.Load(), 60)
	})
}

// A listener begins to drain while a question has marked it, because it could not wait longer
// for its turn. The end of the question must not end the drain.
func TestStopDuringAQuestion(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, refused := range []error{nil, unix.EPERM} { // the filter, and the minimum TTL
			k := sys.Real
			k.Memory = new(sync.Map)
			if refused != nil {
				k.AttachFilter = func(int, *unix.SockFprog) error { return refused }
			}
			l := newServing(t, &k, "127.0.0.1:0")
			newServing(t, &sys.Real, l.TCP.Addr().String())
			_, key, own, err := GroupOf(t.Context(), []*Intake{&l.Intake})
			require.NoError(t, err)
			s := groupsOf(&k).join(&k, key, own)
			require.True(t, s.tryLock())
			drained := make(chan error, 1)
			var once sync.Once
			k.Connect = func(fd int, to unix.Sockaddr) error {
				once.Do(func() {
					go func() {
						drained <- Drain(testkit.Within(t, testkit.Patience), []*Intake{&l.Intake}, func(l Left) error { return l.Err })
					}()
					require.Eventually(t, func() bool {
						l.Mu.Lock()
						defer l.Mu.Unlock()
						return l.Stop != nil
					}, testkit.Patience, time.Millisecond)
				})
				return unix.Connect(fd, to)
			}
			s.Ask(t.Context(), 2, own)
			s.unlock()
			require.NoError(t, testkit.Received(t, drained))
			stops := func() (on bool) {
				require.NoError(t, l.Raw.Control(func(fd uintptr) { on = stateOf(&k, int(fd)).stop() != nil }))
				return on
			}
			require.True(t, stops())
			require.NoError(t, Resume([]*Intake{&l.Intake})[0])
			require.False(t, stops())
		}
	})
}

// Another holder removes the filter or the minimum TTL of a drain on its own descriptor.
func TestDrainNoticesARemoval(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, refused := range []error{nil, unix.EPERM} { // the filter, and the minimum TTL
			k := sys.Real
			if refused != nil {
				k.AttachFilter = func(int, *unix.SockFprog) error { return refused }
			}
			l := newServing(t, &k, "127.0.0.1:0")
			var queued atomic.Int64
			queued.Store(1)
			l.queue = func() (Queue, error) { return Queue{int(queued.Load()), sys.Unknown, 128, 129}, nil }
			drained := make(chan error, 1)
			go func() {
				drained <- Drain(testkit.Within(t, testkit.Patience), []*Intake{&l.Intake}, func(l Left) error { return l.Err })
			}()
			require.Eventually(t, func() bool {
				l.Mu.Lock()
				defer l.Mu.Unlock()
				return l.Stop != nil
			}, testkit.Patience, time.Millisecond)
			require.NoError(t, l.Raw.Control(func(fd uintptr) {
				require.NoError(t, removeStop(&k, int(fd), stateOf(&k, int(fd)).stop()))
			}))
			queued.Store(0)
			err := testkit.Received(t, drained)
			require.ErrorIs(t, err, ErrStillOpen)
			require.ErrorIs(t, err, ErrShared)
		}
	})
}

// Another process holds the turns of a group for ever: it is stopped, or its user wants to
// delay others. A drain goes on without them.
func TestDrainDoesNotWaitForTurns(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		l := newServing(t, &sys.Real, "127.0.0.1:0")
		_, key, _, err := GroupOf(t.Context(), []*Intake{&l.Intake})
		require.NoError(t, err)
		for _, what := range []string{"drain", "question"} {
			t.Cleanup(takeTurn(&sys.Real, t.Context(), what, key))
		}
		drained := make(chan error, 1)
		go func() { drained <- Drain(t.Context(), []*Intake{&l.Intake}, func(l Left) error { return l.Err }) }()
		require.NoError(t, testkit.Received(t, drained))
	})
}
