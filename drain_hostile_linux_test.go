package acceptq

import (
	"context"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Regression tests: each test here failed before a defect of the drain was fixed. The
// defects were found by reviews that tried to break it.

// idle makes the accept loop of l return.
func idle(t *testing.T, l *Listener) {
	t.Helper()
	require.NoError(t, l.SetDeadline(time.Now()))
	require.Eventually(t, func() bool {
		l.gate.mu.Lock()
		defer l.gate.mu.Unlock()
		return l.gate.inside == 0
	}, patience, time.Millisecond)
}

// stalled connects n clients at once and counts the clients without an answer after two
// and a half seconds. The kernel has dropped the SYN of such a client at least twice.
func stalled(address string, n int) int {
	var wait sync.WaitGroup
	var bad atomic.Int64
	for range n {
		wait.Go(func() {
			c, err := net.DialTimeout("tcp", address, 2500*time.Millisecond)
			if err != nil {
				bad.Add(1)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(2500 * time.Millisecond))
			if _, err := c.Read(make([]byte, 1)); err != nil {
				bad.Add(1)
			}
		})
	}
	wait.Wait()
	return int(bad.Load())
}

// A drain whose ctx ends must leave its BPF program on the group, since its socket still
// drops SYNs. Without the program the hash would give some clients to this socket on each
// retry, and they could not connect until Close.
func TestFailedDrainKeepsSteering(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		members := newMembers(t, &sys, "127.0.0.1:0", 2)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		require.ErrorAs(t, l.Drain(within(t, 200*time.Millisecond)), new(*DrainError))
		require.Zero(t, stalled(l.Addr().String(), 40), "of 40 clients, although another listener serves")
	})
}

// A second drain that fails must not remove the BPF program of the first drain, whether
// the first has succeeded or still runs.
func TestSecondDrainKeepsSteering(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		t.Run("the first has ended", func(t *testing.T) {
			members := newMembers(t, &sys, "127.0.0.1:0", 2)
			l := members[0].Listener
			require.NoError(t, l.Drain(within(t, patience)))
			require.Zero(t, stalled(l.Addr().String(), 20), "control")
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			require.Error(t, l.Drain(ctx))
			require.Zero(t, stalled(l.Addr().String(), 40))
			require.NoError(t, l.Resume())
			requireEven(t, shares(t, members, 200)) // Resume has removed the program
		})
		t.Run("the first runs", func(t *testing.T) {
			members := newMembers(t, &sys, "127.0.0.1:0", 3)
			l := members[0].Listener
			idle(t, l)
			c := dialUntil(t, l)
			defer c.Close()
			first := inBackground(t, l, within(t, patience))
			require.Error(t, l.Drain(within(t, 100*time.Millisecond)))
			require.Zero(t, stalled(l.Addr().String(), 40))
			require.NoError(t, l.SetDeadline(time.Time{}))
			go answerEach(l, func() {})
			require.NoError(t, received(t, first))
		})
	})
}

// Wrap removes the filter or minimum TTL of a drain that is still running, because it
// looks like one that a dead process left behind. The drain must notice this and return
// ErrStillOpen: if it returned nil, Close could reset clients.
func TestDrainNoticesWrap(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, v4 way) {
		ln := listen4(t, sys)
		dialed(t, ln, 1)
		drained := inBackground(t, ln, within(t, patience))
		untilStopped(t, ln, v4)
		_, err := sys.wrap(ln.TCPListener())
		require.NoError(t, err)
		s, err := ln.Accept()
		require.NoError(t, err)
		s.Close()
		idle := func() {
			require.NoError(t, ln.SetDeadline(time.Now()))
			ln.Accept()
		}
		idle()
		err = received(t, drained)
		if err != nil {
			require.ErrorIs(t, err, ErrStillOpen)
			return
		}
		c, derr := net.DialTimeout("tcp", ln.Addr().String(), 500*time.Millisecond)
		require.Error(t, derr, "Drain returned nil, but a client got in")
		if derr == nil {
			c.Close()
		}
	})
}

// Another holder removes the filter or minimum TTL of a drain on its own descriptor.
func TestDrainNoticesARemoval(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, v4 way) {
		ln := listen4(t, sys)
		dialed(t, ln, 1)
		drained := inBackground(t, ln, within(t, patience))
		untilStopped(t, ln, v4)
		require.NoError(t, ln.raw.Control(func(fd uintptr) {
			require.NoError(t, sys.remove(int(fd), sys.state(int(fd)).stop()))
		}))
		go answerEach(ln, func() {})
		err := received(t, drained)
		require.ErrorIs(t, err, ErrStillOpen)
		require.ErrorIs(t, err, ErrShared)
	})
}

// Another process holds the turns of a group for ever: it is stopped, or its user wants to
// delay others. A drain goes on without them.
func TestDrainDoesNotWaitForTurns(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		l := listen4(t, realKernel, WithReusePort())
		_, key, _, err := groupOf(t.Context(), []*Listener{l})
		require.NoError(t, err)
		dialed(t, l, 1)
		for _, what := range []string{"drain", "question"} {
			t.Cleanup(realKernel.takeTurn(t.Context(), what, key))
		}
		drained := inBackground(t, l, t.Context())
		awaitStop(t, l)
		go answerEach(l, func() {})
		require.NoError(t, received(t, drained))
	})
}

// With net.ipv4.tcp_migrate_req the kernel moves a queued connection to another process
// when its listener closes. The connection must be able to receive there, although it has
// inherited the minimum TTL of the drain.
func TestMigratedConnectionReceives(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		for _, stop := range stops {
			t.Run(stop.name, func(t *testing.T) {
				sys := stop.kernel()
				listen := func(address string) *Listener {
					l, err := sys.listenWith(t.Context(), "tcp4", address, []Option{WithReusePort()})
					require.NoError(t, err)
					t.Cleanup(func() { l.Close() })
					return l
				}
				old := listen("127.0.0.1:0")
				client := newDeafClient(t, old.Addr())
				heir := listen(old.Addr().String())
				drained := inBackground(t, old, within(t, 1500*time.Millisecond))
				untilStopped(t, old, stop.v4)
				client.hear(t)
				c := client.connected(t)
				require.ErrorAs(t, received(t, drained), new(*DrainError))
				require.NoError(t, old.Close())
				require.NoError(t, heir.SetDeadline(time.Now().Add(patience)))
				s, err := heir.Accept()
				require.NoError(t, err)
				defer s.Close()
				_, err = c.Write([]byte("word"))
				require.NoError(t, err)
				require.NoError(t, s.SetReadDeadline(time.Now().Add(2*time.Second)))
				_, err = io.ReadFull(s, make([]byte, 4))
				require.NoError(t, err, "the data of the client must arrive")
			})
		}
	})
}

// DrainError.InFlight is the number of handshakes in flight when Drain returns, not the
// number when it stopped waiting for them.
func TestDrainErrorHasCurrentNumbers(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.ipv4.tcp_synack_retries", 2) // the kernel gives up after 7 s
		ln := listen4(t, realKernel)
		newDeafClient(t, ln.Addr())
		dialed(t, ln, 1)
		ctx, cancel := context.WithCancel(t.Context())
		drained := inBackground(t, ln, ctx)
		untilStopped(t, ln, way{len(dropSYN), 0, -1})
		require.Eventually(t, func() bool { return synReceived(t, ln.Addr()) == 0 }, patience, 10*time.Millisecond)
		<-time.After(3 * 20 * drainLook) // the drain looks at the handshakes again
		cancel()
		var de *DrainError
		require.ErrorAs(t, received(t, drained), &de)
		require.Equal(t, 1, de.Queued)
		require.LessOrEqual(t, de.InFlight, 0, "the handshake has ended")
	})
}

// Linux before 5.3 can attach a BPF program but cannot detach it. A listener that resumes
// must get clients there too.
func TestResumeWithoutDetach(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		sys.detachProgram = func(int) error { return unix.ENOPROTOOPT }
		members := newMembers(t, &sys, "127.0.0.1:0", 3)
		require.NoError(t, members[0].Drain(within(t, patience)))
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 300))
	})
}

// Resume of one shard must keep the BPF program that steers clients away from the other
// shards.
func TestResumeOfOneShardKeepsSteering(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		old := newGeneration(t, &sys, "tcp4", "127.0.0.1:0", 3)
		next := newGeneration(t, &sys, "tcp4", old.shards.Addr().String(), 1)
		require.NoError(t, old.shards.Drain(within(t, patience)))
		require.Zero(t, stalled(old.shards.Addr().String(), 20), "control")
		for l := range old.shards.All() {
			require.NoError(t, l.Resume())
			break
		}
		require.Zero(t, stalled(old.shards.Addr().String(), 60))
		old.close(t)
		next.close(t)
	})
}

// A listing of the group can lack a row, if it takes several reads and a listener closes
// in between. Close must not panic then.
func TestCloseAfterAnIncompleteListing(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		var inode atomic.Uint32
		sys.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
			rows, err := dump(ctx, r, keep)
			return slices.DeleteFunc(rows, func(r row) bool { return r.inode == inode.Load() && inode.Load() != 0 }), err
		}
		old := newGeneration(t, &sys, "tcp4", "127.0.0.1:0", 3)
		next := newGeneration(t, &sys, "tcp4", old.shards.Addr().String(), 2)
		l := old.shards.listeners[1]
		var stat unix.Stat_t
		require.NoError(t, l.raw.Control(func(fd uintptr) { unix.Fstat(int(fd), &stat) }))
		inode.Store(uint32(stat.Ino))
		require.NoError(t, old.shards.Drain(within(t, patience)))
		require.NotPanics(t, func() { old.shards.Close() })
		next.close(t)
	})
}

// Shards whose descriptors the caller has seen look for duplicates among all descriptors
// of the process. A drain must do this once for all shards, not once for each.
func TestShardsLookAtDescriptorsOnce(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		var limit unix.Rlimit
		require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		n := int(min(limit.Cur-500, 18000))
		null, err := os.Open("/dev/null")
		require.NoError(t, err)
		defer null.Close()
		for range n {
			fd, err := unix.Dup(int(null.Fd()))
			require.NoError(t, err)
			defer unix.Close(fd)
		}
		for _, shown := range []bool{false, true} {
			var opts []Option
			if shown {
				opts = append(opts, withInt(unix.SOL_SOCKET, unix.SO_PRIORITY, 1))
			}
			s, err := ListenTCPShards("127.0.0.1:0", 64, opts...)
			require.NoError(t, err)
			began := time.Now()
			err = s.Drain(within(t, 50*time.Millisecond))
			took := time.Since(began)
			t.Logf("%d descriptors, seen by the caller: %v; %v, error %v", n, shown, took, err)
			s.Close()
			if shown {
				require.Less(t, took, time.Second, "the timeout of ctx was 50 ms")
			}
		}
	})
}

// The handshakes in flight of all shards must be compared with the sum of their limits.
// Compared with the limit of one shard, they would look like an overflow with SYN cookies,
// and the number in flight would be unknown.
func TestInFlightUsesTheLimitOfAllShards(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		s, err := ListenTCPShards("127.0.0.1:0", 16, WithBacklog(4))
		require.NoError(t, err)
		var loops sync.WaitGroup
		for l := range s.All() {
			loops.Go(func() { answerEach(l, func() {}) })
		}
		defer loops.Wait()
		defer s.Close()
		var deaf []*deafClient
		for range 8 {
			deaf = append(deaf, newDeafClient(t, s.Addr()))
		}
		err = s.Drain(within(t, 500*time.Millisecond))
		var de *DrainError
		require.ErrorAs(t, err, &de)
		for _, c := range deaf {
			c.hear(t)
		}
		require.Equal(t, 8, de.InFlight)
	})
}

// If the sockets of shards are blocking, each look can wait for a tenth of a second for
// each shard. The drain must still end with ctx.
func TestDrainOfBlockingShardsEndsWithContext(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		s, err := ListenTCPShards("127.0.0.1:0", 32)
		require.NoError(t, err)
		var loops sync.WaitGroup
		for l := range s.All() {
			var operr error
			require.NoError(t, l.raw.Control(func(fd uintptr) { operr = unix.SetNonblock(int(fd), false) }))
			require.NoError(t, operr)
			loops.Go(func() { answerEach(l, func() {}) })
		}
		require.Eventually(t, func() bool {
			for l := range s.All() {
				l.gate.mu.Lock()
				n := l.gate.inside
				l.gate.mu.Unlock()
				if n == 0 {
					return false
				}
			}
			return true
		}, patience, time.Millisecond)
		time.Sleep(50 * time.Millisecond)
		began := time.Now()
		err = s.Drain(within(t, 200*time.Millisecond))
		took := time.Since(began)
		for l := range s.All() { // end the blocking accept(2), so that Close can return
			l.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RD) })
		}
		s.Close()
		loops.Wait()
		require.Less(t, took, 2*time.Second, "the timeout of ctx was 200 ms: %v", err)
	})
}

// A second drain fails while the first still runs and attaches its BPF program again.
// Resume must then remove the program, so that the listener gets its share of the clients.
func TestResumeRemovesTheProgram(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		members := newMembers(t, &sys, "127.0.0.1:0", 2)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		first := inBackground(t, l, within(t, patience))
		require.Error(t, l.Drain(within(t, 100*time.Millisecond)))
		members = append(members, newMembers(t, &sys, l.Addr().String(), 1)...)
		// Call Accept again, so that the first drain ends.
		time.Sleep(50 * time.Millisecond)
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() { members[0].clients.Add(1) })
		require.NoError(t, received(t, first))
		require.NoError(t, l.Resume())
		requireEven(t, shares(t, members, 300))
	})
}

// The same as TestCloseAfterAnIncompleteListing, with the real listing of the kernel,
// while other listeners of the address are opened and closed.
func TestSteeringWhileListenersOpenAndClose(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		panics, wrong := 0, 0
		const tries = 60
		for range tries {
			func() {
				s, err := sys.shards(t.Context(), "tcp4", "127.0.0.1:0", 64, []Option{WithReusePort()})
				require.NoError(t, err)
				var loops sync.WaitGroup
				for l := range s.All() {
					loops.Go(func() { answerEach(l, func() {}) })
				}
				defer loops.Wait()
				heir, err := sys.shards(t.Context(), "tcp4", s.Addr().String(), 1, []Option{WithReusePort()})
				require.NoError(t, err)
				defer heir.Close()
				stop := make(chan struct{})
				var wait sync.WaitGroup
				wait.Go(func() { // like a third process that opens and closes 64 shards
					for {
						select {
						case <-stop:
							return
						default:
						}
						if third, err := sys.shards(t.Context(), "tcp4", s.Addr().String(), 64, []Option{WithReusePort()}); err == nil {
							third.Close()
						}
					}
				})
				err = s.Drain(within(t, patience))
				close(stop)
				wait.Wait()
				func() {
					defer func() {
						if recover() != nil {
							panics++
						}
					}()
					s.Close()
				}()
				for l := range s.All() {
					l.tcp.Close()
				}
			}()
		}
		require.Zero(t, panics+wrong, "of %d closes %d panicked; %d drains had a wrong index for a shard", tries, panics, wrong)
	})
}

// Close of a blocking socket hangs, as it does with package net. A drain that runs at the
// same time must still end with its ctx.
func TestDrainEndsWhileCloseHangs(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		members := newMembers(t, &sys, "127.0.0.1:0", 1)
		l := members[0].Listener
		newDeafClient(t, l.Addr()) // the drain waits for it
		newMembers(t, &sys, l.Addr().String(), 1)
		var operr error
		require.NoError(t, l.raw.Control(func(fd uintptr) { operr = unix.SetNonblock(int(fd), false) }))
		require.NoError(t, operr)
		c := dialUntilAccepted(t, members[0]) // so its loop is in a blocking accept(2) now
		defer c.Close()
		drained := inBackground(t, l, within(t, time.Second))
		untilStopped(t, l, way{len(dropSYN), 0, -1})
		closed := make(chan struct{})
		go func() { l.Close(); close(closed) }()
		var hung bool
		select {
		case <-drained:
		case <-time.After(5 * time.Second):
			hung = true
		}
		// End the accept(2) by shutdown(2) on the descriptor. The listener cannot do
		// it: it is being closed.
		for fd := 3; fd < 64; fd++ {
			if sa, err := unix.Getsockname(fd); err == nil {
				if a, ok := sa.(*unix.SockaddrInet4); ok && a.Port == l.Addr().(*net.TCPAddr).Port {
					unix.Shutdown(fd, unix.SHUT_RD)
				}
			}
		}
		<-closed
		require.False(t, hung, "ctx ended four seconds ago")
	})
}

func dialUntilAccepted(t *testing.T, m *counted) net.Conn {
	t.Helper()
	for range 1000 {
		before := m.clients.Load()
		c, err := net.DialTimeout("tcp", m.Addr().String(), patience)
		require.NoError(t, err)
		c.SetReadDeadline(time.Now().Add(patience))
		c.Read(make([]byte, 1))
		if m.clients.Load() > before {
			return c
		}
		c.Close()
	}
	t.Fatal("m accepted none of the connections")
	return nil
}

// The accept queue is full for more than three seconds, so a handshake cannot end: its
// final ACK is dropped, but the client believes that it is connected. The drain must wait
// for it as long as ctx lasts, or Close would reset the client.
func TestDrainWaitsForHandshakesBehindAFullQueue(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		ln := listen4(t, realKernel, WithBacklog(1))
		client := newDeafClient(t, ln.Addr())
		full := connectUntilFull(t, ln.Addr(), 10)
		require.NotEmpty(t, full)
		drained := inBackground(t, ln, within(t, patience))
		untilStopped(t, ln, way{len(dropSYN), 0, -1})
		client.hear(t)
		c := client.connected(t)            // to the client: its final ACK was dropped by the full queue
		time.Sleep(3500 * time.Millisecond) // the server is slow
		taken := make(chan net.Conn, 10)
		go func() {
			for {
				s, err := ln.Accept()
				if err != nil {
					return
				}
				taken <- s
			}
		}()
		err := received(t, drained)
		s, serr := ln.Stats()
		require.NoError(t, serr)
		require.NoError(t, ln.Close())
		c.Write([]byte("word"))
		require.NoError(t, c.SetReadDeadline(time.Now().Add(3*time.Second)))
		_, rerr := c.Read(make([]byte, 1))
		for len(taken) > 0 {
			defer (<-taken).Close()
		}
		require.NotErrorIs(t, rerr, unix.ECONNRESET, "Drain returned %v; accepted %d of %d; %v", err, len(taken), len(full), s)
	})
}

// Linux before 5.14 does not report the namespace of a socket. A drain of a socket in
// another namespace finds no handshakes in its own namespace. It must not conclude that
// none are in flight.
func TestDrainWithoutNamespaceCookie(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		sys.getsockopt = func(fd, level, name int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && name == unix.SO_NETNS_COOKIE {
				return 0, unix.ENOPROTOOPT
			}
			return getsockopt(fd, level, name, p)
		}
		other := newVisited(t)
		var ln *Listener
		other.in(func() {
			var err error
			ln, err = sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", nil)
			require.NoError(t, err)
		})
		defer ln.Close()
		var fd int
		other.in(func() { fd = deafSocket(t, ln.Addr()) })
		began := time.Now()
		err := ln.Drain(within(t, patience))
		took := time.Since(began)
		require.NoError(t, ln.Close())
		unix.Close(fd)
		require.Greater(t, took, time.Second, "a handshake was in flight, but Drain returned %v at once", err)
	})
}

// For an IPv6 socket that is bound to an IPv4-mapped address, a drain must look for
// handshakes in flight among those of IPv4.
func TestDrainOfAMappedAddress(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		haveIPv6(t)
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		require.NoError(t, err)
		require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
		sa := &unix.SockaddrInet6{}
		copy(sa.Addr[:], net.ParseIP("127.0.0.1").To16())
		require.NoError(t, unix.Bind(fd, sa))
		require.NoError(t, unix.Listen(fd, 10))
		f := os.NewFile(uintptr(fd), "listener")
		inner, err := net.FileListener(f)
		require.NoError(t, err)
		f.Close()
		ln, err := Wrap(inner)
		require.NoError(t, err)
		defer ln.Close()
		newDeafClient(t, ln.Addr())
		var de *DrainError
		require.ErrorAs(t, ln.Drain(within(t, 200*time.Millisecond)), &de, "a handshake is in flight")
		require.Equal(t, 1, de.InFlight)
	})
}
