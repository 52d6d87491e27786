package acceptq

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
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
				require.Equal(t, bpfRandom, i.K)
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
	for n := 1; n <= 10; n++ {
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
			p := program(n, excluded)
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
	require.Len(t, program(4096, many), 4095, "the kernel takes 4096")
	require.Nil(t, program(4096, append(many, 2046)))
}

// A generation has the listeners of one process of a rolling restart.
type generation struct {
	shards *Shards
	done   chan error
}

// newGeneration opens n listeners at address. They answer each client with one byte.
func newGeneration(t *testing.T, k *kernel, network, address string, n int, opts ...Option) *generation {
	t.Helper()
	s, err := k.shards(t.Context(), network, address, n, append([]Option{WithReusePort(), WithBacklog(1024)}, opts...))
	require.NoError(t, err)
	g := &generation{s, make(chan error, 1)}
	go func() {
		g.done <- s.Serve(func(ln net.Listener) error { return answerEach(ln, func() {}) })
	}()
	return g
}

// answerEach answers each client with one byte until ln is closed.
func answerEach(ln net.Listener, accepted func()) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		accepted()
		c.Write([]byte{'!'})
		c.Close()
	}
}

// end drains and closes.
func (g *generation) end(t *testing.T) {
	t.Helper()
	require.NoError(t, g.shards.Drain(within(t, patience)))
	g.close(t)
}

func (g *generation) close(t *testing.T) {
	t.Helper()
	require.NoError(t, g.shards.Close())
	require.ErrorIs(t, <-g.done, net.ErrClosed)
}

// A throng is a number of clients that connect to an address repeatedly.
type throng struct {
	stop     chan struct{}
	wait     sync.WaitGroup
	ok, lost atomic.Int64
	failure  atomic.Value
}

func newThrong(n int, address string) *throng {
	th := &throng{stop: make(chan struct{})}
	for range n {
		th.wait.Go(func() {
			for {
				select {
				case <-th.stop:
					return
				default:
				}
				if err := ask(address); err != nil {
					th.lost.Add(1)
					th.failure.Store(err)
					return
				}
				th.ok.Add(1)
			}
		})
	}
	return th
}

// ask runs one client.
func ask(address string) error {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = c.Read(make([]byte, 1))
	return err
}

func (th *throng) end(t *testing.T) (answered int64) {
	t.Helper()
	close(th.stop)
	th.wait.Wait()
	require.Zero(t, th.lost.Load(), "%v", th.failure.Load())
	return th.ok.Load()
}

// answers waits until n more clients have their answer.
func (th *throng) answers(t *testing.T, n int64) {
	t.Helper()
	want := th.ok.Load() + n
	require.Eventually(t, func() bool { return th.ok.Load() >= want || th.lost.Load() > 0 }, patience, time.Millisecond)
}

// Generations replace each other under constant load. No client is lost, and very few have
// to retransmit their SYN. The kernel counts the retransmissions.
func TestSteeredGenerations(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, way way) {
		for _, row := range []struct {
			name, network, address, dial string
			sizes                        []int
			generations                  int
			opts                         []Option
			most                         int64 // the maximum of retransmitted SYNs
		}{
			{"control: without steering", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{1}, 3, []Option{WithoutSteering()}, 0},
			{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{1}, 50, nil, 5},
			{"IPv6", "tcp6", "[::1]:0", "::1", []int{1}, 10, nil, 3},
			{"wildcard of both families, a client of IPv4", "tcp", ":0", "127.0.0.1", []int{1}, 10, nil, 3},
			{"IPv4 wildcard, 3 and 8 and 2 shards", "tcp4", ":0", "127.0.0.1", []int{3, 8, 2}, 9, nil, 3},
			// When several listeners and one other remain, each close leaves a short gap.
			{"IPv6, 4 and 1 shards", "tcp6", "[::1]:0", "::1", []int{4, 1}, 8, nil, 20},
			{"64 shards", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{64}, 3, nil, 3},
		} {
			if way.filter == 0 && slices.Max(row.sizes) > 1 {
				continue // steering does not depend on what drops the SYNs
			}
			t.Run(row.name, func(t *testing.T) {
				if strings.Contains(row.network+row.address, "6") || row.network == "tcp" {
					haveIPv6(t)
				}
				g := newGeneration(t, &k, row.network, row.address, row.sizes[0], row.opts...)
				address := g.shards.Addr().String()
				port := g.shards.Addr().(*net.TCPAddr).Port
				clients := newThrong(8, net.JoinHostPort(row.dial, strconv.Itoa(port)))
				clients.answers(t, 50)
				before := kernelCounter(t, "TCPSynRetrans")
				generations := row.generations
				if generations > 20 && way.filter == 0 || testing.Short() {
					generations = min(generations, 10)
				}
				for i := range generations {
					next := newGeneration(t, &k, row.network, address, row.sizes[(i+1)%len(row.sizes)], row.opts...)
					g.end(t)
					g = next
					clients.answers(t, 20)
				}
				answered := clients.end(t)
				again := kernelCounter(t, "TCPSynRetrans") - before
				t.Logf("%d generations: %d answered, none lost, %d SYNs sent again", generations, answered, again)
				if row.opts != nil {
					require.Greater(t, again, int64(row.generations/2))
				} else {
					require.LessOrEqual(t, again, row.most)
				}
				g.close(t)
			})
		}
	})
}

// A counted is a listener of a group that counts its clients.
type counted struct {
	*Listener
	clients atomic.Int64
}

func newMembers(t *testing.T, k *kernel, address string, n int, opts ...Option) (all []*counted) {
	t.Helper()
	for range n {
		ln, err := k.listenWith(t.Context(), "tcp4", address, append([]Option{WithReusePort(), WithBacklog(1024)}, opts...))
		require.NoError(t, err)
		address = ln.Addr().String()
		c := &counted{Listener: ln}
		done := make(chan struct{})
		go func() {
			defer close(done)
			answerEach(ln, func() { c.clients.Add(1) })
		}()
		t.Cleanup(func() { ln.Close(); <-done })
		all = append(all, c)
	}
	return all
}

// shares connects n clients and returns how many each member got.
func shares(t *testing.T, members []*counted, n int) (parts []float64) {
	t.Helper()
	before := make([]int64, len(members))
	for i, m := range members {
		before[i] = m.clients.Load()
	}
	for range n {
		require.NoError(t, ask(members[0].Addr().String()))
	}
	for i, m := range members {
		parts = append(parts, float64(m.clients.Load()-before[i])/float64(n))
	}
	return parts
}

// requireEven requires that each share is about what the hash of the kernel gives.
func requireEven(t *testing.T, parts []float64) {
	t.Helper()
	for _, part := range parts {
		require.InDelta(t, 1/float64(len(parts)), part, 0.6/float64(len(parts)), "%v", parts)
	}
}

// A process was killed and left a BPF program that gives all clients to one listener. The
// next listener removes the program, because all members answer. With WithoutSteering it
// stays.
func TestListenHealsAGroup(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := realKernel
		for _, row := range []struct {
			name   string
			opts   []Option
			healed bool
		}{{"WithReusePort", nil, true}, {"WithoutSteering", []Option{WithoutSteering()}, false}} {
			t.Run(row.name, func(t *testing.T) {
				members := newMembers(t, &k, "127.0.0.1:0", 2)
				requireEven(t, shares(t, members, 200))
				left := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}
				onDescriptor(t, members[0].Listener, func(fd int) (int, error) { return 0, attachProgram(fd, left) })
				require.Equal(t, []float64{0, 1}, shares(t, members, 50))
				members = append(members, newMembers(t, &k, members[0].Addr().String(), 1, row.opts...)...)
				if row.healed {
					requireEven(t, shares(t, members, 300))
				} else {
					require.Equal(t, []float64{0, 1, 0}, shares(t, members, 50))
				}
			})
		}
	})
}

// While one listener drains, the others share its clients. After its close, or after
// Resume, the hash of the kernel decides again.
func TestSharesAroundADrain(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		for drains := range 4 {
			members := newMembers(t, &k, "127.0.0.1:0", 4)
			others := slices.Delete(slices.Clone(members), drains, drains+1)
			require.NoError(t, members[drains].Drain(within(t, patience)))
			before := kernelCounter(t, "TCPSynRetrans")
			requireEven(t, shares(t, others, 200))
			require.NoError(t, members[drains].Resume())
			requireEven(t, shares(t, members, 300))
			require.NoError(t, members[drains].Drain(within(t, patience)))
			requireEven(t, shares(t, others, 200))
			require.NoError(t, members[drains].Close())
			if drains < 3 { // the last drain leaves a program, which gives the others equal shares
				requireEven(t, shares(t, others, 200))
			}
			newcomers := newMembers(t, &k, members[drains].Addr().String(), 1)
			requireEven(t, shares(t, append(others, newcomers...), 300))
			require.Equal(t, before, kernelCounter(t, "TCPSynRetrans"), "member %d", drains)
		}
	})
}

// awaitStop waits until a drain of l keeps new clients out: before, clients fall into its
// queue, and nobody accepts them.
func awaitStop(t *testing.T, l *Listener) {
	t.Helper()
	require.Eventually(t, func() bool {
		l.intake.mu.Lock()
		defer l.intake.mu.Unlock()
		return l.intake.stop != nil
	}, patience, time.Millisecond)
}

// dialUntil leaves a connection in the queue of l, a member of a group.
func dialUntil(t *testing.T, l *Listener) net.Conn {
	t.Helper()
	for range 1000 {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		require.NoError(t, err)
		if s, err := l.Stats(); err == nil && s.Queued > 0 {
			return c
		}
		c.Close()
	}
	t.Fatal("l got no client")
	return nil
}

// The successor dies while the old listener drains. No listener is left to steer to, so the
// library removes the program, and the next listener gets the clients.
func TestSuccessorDies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		members := newMembers(t, &k, "127.0.0.1:0", 2)
		old, successor := members[0], members[1]
		require.NoError(t, old.SetDeadline(time.Now()))
		c := dialUntil(t, old.Listener)
		defer c.Close()
		drained := inBackground(t, old.Listener, within(t, 500*time.Millisecond))
		on := func() bool {
			s := old.intake.steering.Load()
			if s == nil {
				return false
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.on
		}
		require.Eventually(t, on, patience, time.Millisecond)
		require.NoError(t, successor.Close())
		require.Eventually(t, func() bool { return !on() }, patience, time.Millisecond)
		require.ErrorAs(t, received(t, drained), new(*DrainError))
		third := newMembers(t, &k, old.Addr().String(), 1)
		require.NoError(t, old.Close())
		require.Equal(t, []float64{1}, shares(t, third, 50))
	})
}

// If no program can be attached, or the group cannot be listed, a drain works as without
// steering.
func TestDrainWithoutAProgram(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		for name, breaks := range map[string]func(*kernel){
			"EPERM": func(k *kernel) { k.attachProgram = func(int, []unix.SockFilter) error { return unix.EPERM } },
			"no listing": func(k *kernel) {
				k.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
					if r.states == 1<<tcpListen {
						return nil, unix.EACCES
					}
					return dump(ctx, r, keep)
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				broken := k
				breaks(&broken)
				members := newMembers(t, &broken, "127.0.0.1:0", 2)
				require.NoError(t, members[0].Drain(within(t, patience)))
				require.Equal(t, v4, wayOf(t, members[0].raw))
				require.NoError(t, members[0].Close())
				require.Equal(t, []float64{1}, shares(t, members[1:], 50))
			})
		}
	})
}
