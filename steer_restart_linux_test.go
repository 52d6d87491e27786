package acceptq

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// steeringDrainerEnv is the address of a process that drains and is killed.
const steeringDrainerEnv = "ACCEPTQ_TEST_STEERING_DRAINER"

// drainer is that process.
func drainer(t *testing.T, address string) {
	sys := realKernel
	l := newMembers(t, &sys, address, 1)[0]
	fmt.Println("listens at", l.Addr())
	bufio.NewReader(os.Stdin).ReadString('\n')
	require.NoError(t, l.Drain(within(t, patience)))
	fmt.Println("drained")
	select {} // until it is killed
}

// A process is killed after its drain, with the program still on the group: nobody is
// lost or stalled, and the next process that listens has its share of the clients.
func TestSteeringDrainerIsKilled(t *testing.T) {
	if address := os.Getenv(steeringDrainerEnv); address != "" {
		drainer(t, address)
	}
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		for _, row := range []struct {
			name          string
			before, after int // listeners in the order of listen(2)
		}{{"the first of two", 0, 1}, {"the last of two", 1, 0}, {"the first of three", 0, 2}, {"the second of three", 1, 1}, {"the last of three", 2, 0}} {
			t.Run(row.name, func(t *testing.T) {
				var members []*counted
				address := "127.0.0.1:0"
				if row.before > 0 {
					members = newMembers(t, &sys, address, row.before)
					address = members[0].Addr().String()
				}
				self, err := os.Executable()
				require.NoError(t, err)
				cmd := exec.Command(self, "-test.run=^TestSteeringDrainerIsKilled$")
				cmd.Env = append(os.Environ(), steeringDrainerEnv+"="+address)
				in, err := cmd.StdinPipe()
				require.NoError(t, err)
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
				lines := bufio.NewScanner(out)
				require.True(t, lines.Scan())
				address = strings.TrimPrefix(lines.Text(), "listens at ")
				if row.after > 0 {
					members = append(members, newMembers(t, &sys, address, row.after)...)
				}
				clients := newThrong(16, address)
				clients.answers(t, 50)
				before := kernelCounter(t, "TCPSynRetrans")
				_, err = in.Write([]byte{'\n'})
				require.NoError(t, err)
				require.True(t, lines.Scan())
				require.Equal(t, "drained", lines.Text())
				clients.answers(t, 100)
				require.NoError(t, cmd.Process.Kill())
				cmd.Wait()
				clients.answers(t, 100)
				newcomer := newMembers(t, &sys, address, 1)
				clients.answers(t, 100)
				clients.end(t)
				require.LessOrEqual(t, kernelCounter(t, "TCPSynRetrans")-before, int64(1))
				requireEven(t, shares(t, append(members, newcomer...), 300))
			})
		}
	})
}

// Two members of a group drain at once, each by a call of its own: no client is lost. The
// others have even shares afterwards.
func TestTwoDrainersAtOnce(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		members := newMembers(t, &sys, "127.0.0.1:0", 4)
		clients := newThrong(16, members[0].Addr().String())
		before := kernelCounter(t, "TCPSynRetrans")
		const rounds = 4
		for range rounds {
			clients.answers(t, 30)
			var both sync.WaitGroup
			errs := make([]error, 2)
			for i, m := range members[:2] {
				both.Go(func() { errs[i] = errors.Join(m.Drain(within(t, patience)), m.Close()) })
			}
			both.Wait()
			require.NoError(t, errors.Join(errs...))
			members = append(members[2:], newMembers(t, &sys, members[3].Addr().String(), 2)...)
		}
		answered := clients.end(t)
		t.Logf("%d rounds: %d answered, none lost, %d SYNs sent again", rounds, answered, kernelCounter(t, "TCPSynRetrans")-before)
		requireEven(t, shares(t, members, 300))
	})
}

// Members come and go while another one drains. In the end the member that drains gets no
// clients.
func TestMembersComeAndGo(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		members := newMembers(t, &sys, "127.0.0.1:0", 3)
		l := members[1].Listener
		address := l.Addr().String()
		others := []*counted{members[0], members[2]}
		// Its loop ends, so the drain waits for what is queued.
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		drained := inBackground(t, l, within(t, patience))
		awaitStop(t, l)
		clients := newThrong(16, address)
		for i := range 5 {
			clients.answers(t, 20)
			others = append(others, newMembers(t, &sys, address, 1)...)
			clients.answers(t, 20)
			gone := others[i%len(others)]
			others = slices.DeleteFunc(others, func(m *counted) bool { return m == gone })
			require.NoError(t, gone.Drain(within(t, patience)))
			require.NoError(t, gone.Close())
		}
		drops := func() int64 {
			s, err := l.Stats()
			require.NoError(t, err)
			return s.Drops
		}
		require.Eventually(t, func() bool {
			before := drops()
			clients.answers(t, 200)
			return drops() == before
		}, patience, time.Millisecond, "it is still given clients")
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() {})
		require.NoError(t, received(t, drained))
		require.NoError(t, l.Close())
		t.Logf("%d answered", clients.end(t))
		requireEven(t, shares(t, append(others, newMembers(t, &sys, address, 1)...), 300))
	})
}

// With net.ipv4.tcp_migrate_req the kernel gives what a closing listener has to the
// other members of its group. With a program besides, a Close without Drain loses
// nobody. Neither of the two alone does that.
func TestMigrateAndSteer(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		sys := realKernel
		for _, row := range []struct {
			name    string
			migrate int
			loses   bool
		}{{"the program alone", 0, true}, {"both", 1, false}} {
			t.Run(row.name, func(t *testing.T) {
				setSysctl(t, "net.ipv4.tcp_migrate_req", row.migrate)
				system, err := ReadSystem()
				require.NoError(t, err)
				require.Equal(t, row.migrate, system.MigrateRequests)
				current := newMembers(t, &sys, "127.0.0.1:0", 1)[0]
				var answered, lost atomic.Int64
				stop := make(chan struct{})
				var clients sync.WaitGroup
				for range 32 {
					clients.Go(func() {
						for {
							select {
							case <-stop:
								return
							default:
							}
							if ask(current.Addr().String()) != nil {
								lost.Add(1)
							} else {
								answered.Add(1)
							}
						}
					})
				}
				const restarts = 20
				address := current.Addr().String()
				last := current
				for range restarts {
					want := answered.Load() + 50
					require.Eventually(t, func() bool { return answered.Load() >= want }, patience, time.Millisecond)
					next := newMembers(t, &sys, address, 1)[0]
					onDescriptor(t, last.Listener, func(fd int) (int, error) { return 0, attachProgram(fd, program(2, []int{0})) })
					require.NoError(t, last.Close())
					last = next
				}
				close(stop)
				clients.Wait()
				t.Logf("%d restarts: %d answered, %d lost", restarts, answered.Load(), lost.Load())
				require.Equal(t, row.loses, lost.Load() > 0)
			})
		}
	})
}

// A drain runs out of time with a connection in its queue. With net.ipv4.tcp_migrate_req
// the other member of the group serves it after Close; without it Close resets it.
func TestMigrateAfterADrainThatRanOut(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		for migrate, want := range []error{unix.ECONNRESET, nil} {
			setSysctl(t, "net.ipv4.tcp_migrate_req", migrate)
			members := newMembers(t, &sys, "127.0.0.1:0", 2)
			old := members[0]
			require.NoError(t, old.SetDeadline(time.Now())) // its loop ends
			require.Eventually(t, func() bool {
				old.gate.mu.Lock()
				defer old.gate.mu.Unlock()
				return old.gate.inside == 0
			}, patience, time.Millisecond)
			c := dialUntil(t, old.Listener)
			defer c.Close()
			var left *DrainError
			require.ErrorAs(t, old.Drain(within(t, 50*time.Millisecond)), &left)
			require.Equal(t, 1, left.Queued)
			require.NoError(t, old.Close())
			require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
			_, err := c.Read(make([]byte, 1))
			if want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, want)
			}
		}
	})
}

// A handshake by a SYN cookie has no state, so its last ACK goes to a listener that is
// chosen then: with steering to one that does not drain.
func TestSteeringLeadsCookies(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.ipv4.tcp_syncookies", 2)
		sys := realKernel
		for _, row := range []struct {
			name string
			opts []Option
		}{{"steered", nil}, {"not steered", []Option{WithoutSteering()}}} {
			t.Run(row.name, func(t *testing.T) {
				members := newMembers(t, &sys, "127.0.0.1:0", 2, row.opts...)
				old, successor := members[0], members[1]
				d := net.Dialer{Timeout: patience, Control: lateACK}
				var conns []net.Conn
				for range 40 {
					c, err := d.Dial("tcp", old.Addr().String())
					require.NoError(t, err)
					defer c.Close()
					conns = append(conns, c)
				}
				drained := inBackground(t, old.Listener, within(t, patience))
				awaitStop(t, old.Listener)
				before, beside := old.clients.Load(), successor.clients.Load()
				for _, c := range conns {
					require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
					_, err := c.Write([]byte{'?'})
					require.NoError(t, err)
					_, err = c.Read(make([]byte, 1))
					require.NoError(t, err)
				}
				late := successor.clients.Load() - beside
				t.Logf("%d answered: while one drains, %d by the other and %d by it", len(conns), late, old.clients.Load()-before)
				require.Positive(t, late)
				if row.opts == nil {
					require.Equal(t, before, old.clients.Load())
				} else {
					require.Greater(t, old.clients.Load(), before)
				}
				require.NoError(t, received(t, drained))
			})
		}
	})
}

// Each kernel call that steering adds fails, from the first time on or later: a restart
// loses nobody all the same, and stalls no more clients than one without steering, which
// may stall each client once.
func TestRestartsUnderFaults(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, sys kernel, _ way) {
		fails := func(after int, err error) func() error {
			var calls atomic.Int64
			return func() error {
				if calls.Add(1) > int64(after) {
					return err
				}
				return nil
			}
		}
		faults := map[string]func(sys *kernel, fail func() error){
			"attach": func(sys *kernel, fail func() error) {
				attach := sys.attachProgram
				sys.attachProgram = func(fd int, p []unix.SockFilter) error {
					if err := fail(); err != nil {
						return err
					}
					return attach(fd, p)
				}
			},
			"detach": func(sys *kernel, fail func() error) {
				detach := sys.detachProgram
				sys.detachProgram = func(fd int) error {
					if err := fail(); err != nil {
						return err
					}
					return detach(fd)
				}
			},
			"list": func(sys *kernel, fail func() error) {
				sys.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
					if r.states == 1<<tcpListen {
						if err := fail(); err != nil {
							return nil, err
						}
					}
					return dump(ctx, r, keep)
				}
			},
			"a row too short": func(sys *kernel, fail func() error) {
				sys.dump = func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
					if r.states == 1<<tcpListen && fail() != nil {
						return listing(make([]byte, diagMsgSize-1))(ctx, r, keep)
					}
					return dump(ctx, r, keep)
				}
			},
		}
		const restarts, clients = 3, 8
		before := kernelCounter(t, "TCPSynRetrans")
		runs := 0
		t.Run("fault", func(t *testing.T) {
			for name, breaks := range faults {
				for _, errno := range []unix.Errno{unix.EPERM, unix.EINVAL, unix.ENOMEM} {
					if name == "a row too short" && errno != unix.EPERM {
						continue
					}
					for _, after := range []int{0, 1, 4} {
						runs++
						t.Run(fmt.Sprintf("%s, %v after %d", name, errno, after), func(t *testing.T) {
							t.Parallel()
							broken := sys
							breaks(&broken, fails(after, errno))
							current := newMembers(t, &broken, "127.0.0.1:0", 1)[0]
							address := current.Addr().String()
							throng := newThrong(clients, address)
							for range restarts {
								throng.answers(t, 20)
								next := newMembers(t, &broken, address, 1)[0]
								require.NoError(t, current.Drain(within(t, patience)))
								require.NoError(t, current.Close())
								current = next
							}
							throng.end(t)
							require.Equal(t, []float64{1}, shares(t, []*counted{current}, 20))
						})
					}
				}
			}
		})
		again := kernelCounter(t, "TCPSynRetrans") - before
		t.Logf("%d runs of %d restarts, %d clients: %d SYNs sent again", runs, restarts, clients, again)
		require.LessOrEqual(t, again, int64(runs*restarts*clients))
	})
}
