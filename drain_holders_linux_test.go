package acceptq

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// drainerEnv is set in a child process that drains an inherited socket until it is killed,
// with the filter or with the minimum TTL.
const drainerEnv = "ACCEPTQ_TEST_DRAINER"

// drainForever drains a queue from which no process accepts.
func drainForever(t *testing.T, k kernel) {
	f := os.NewFile(3, "listener")
	inner, err := net.FileListener(f)
	require.NoError(t, err)
	f.Close()
	ln, err := k.wrap(inner)
	require.NoError(t, err)
	go func() { // end when the parent has ended
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	t.Log(ln.Drain(context.Background()))
}

// killWhileDraining starts a child that drains ln, whose queue is not empty, and kills it.
func killWhileDraining(t *testing.T, stopName string, ln *net.TCPListener, want way) {
	t.Helper()
	f, err := ln.File()
	require.NoError(t, err)
	defer f.Close()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.run=^TestDrainerIsKilled$")
	cmd.Env = append(os.Environ(), drainerEnv+"="+stopName)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	defer stdin.Close()
	require.NoError(t, cmd.Start())
	raw, err := ln.SyscallConn()
	require.NoError(t, err)
	require.Eventually(t, func() bool { return wayOf(t, raw) == want }, patience, time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	cmd.Wait()
	require.Equal(t, want, wayOf(t, raw), "the stop must stay on the socket, which is still open")
	// os/exec has made the socket blocking: it calls Fd on the copy.
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.SetNonblock(int(fd), true) }))
	require.NoError(t, err)
}

// A process that is killed during a drain leaves the stop on the shared socket. Wrap and
// the end of the next drain remove it. Connections that have inherited it receive data
// again.
func TestDrainerIsKilled(t *testing.T) {
	if name := os.Getenv(drainerEnv); name != "" {
		for _, stop := range stops {
			if stop.name == name {
				drainForever(t, stop.kernel())
			}
		}
		return
	}
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		for _, stop := range stops {
			heir := func(t *testing.T) *net.TCPListener {
				var lc net.ListenConfig
				lc.SetMultipathTCP(false)
				ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
				require.NoError(t, err)
				t.Cleanup(func() { ln.Close() })
				return ln.(*net.TCPListener)
			}
			for _, row := range []struct {
				name string
				// heal returns the Listener that removes the stop, before or after the kill
				heal func(t *testing.T, k kernel, ln *net.TCPListener, kill func()) *Listener
			}{
				{"control: the stop is not removed", func(t *testing.T, k kernel, ln *net.TCPListener, kill func()) *Listener {
					_, err := k.wrap(ln)
					require.NoError(t, err)
					kill()
					d := net.Dialer{Timeout: 100 * time.Millisecond}
					_, err = d.Dial("tcp", ln.Addr().String())
					requireDropped(t, err)
					return nil
				}},
				{"Wrap", func(t *testing.T, k kernel, ln *net.TCPListener, kill func()) *Listener {
					kill()
					w, err := k.wrap(ln)
					require.NoError(t, err)
					return w
				}},
				{"the next drain", func(t *testing.T, k kernel, ln *net.TCPListener, kill func()) *Listener {
					w, err := k.wrap(ln)
					require.NoError(t, err)
					kill()
					require.ErrorAs(t, w.Drain(within(t, 50*time.Millisecond)), new(*DrainError))
					return w
				}},
				{"Drain without permission for filters, then Resume", func(t *testing.T, _ kernel, ln *net.TCPListener, kill func()) *Listener {
					unprivileged := withoutFilter()
					w, err := unprivileged.wrap(ln)
					require.NoError(t, err)
					kill()
					require.ErrorAs(t, w.Drain(within(t, 50*time.Millisecond)), new(*DrainError))
					require.NoError(t, w.Resume())
					return w
				}},
			} {
				t.Run(stop.name+": "+row.name, func(t *testing.T) {
					ln := heir(t)
					queued, err := net.Dial("tcp", ln.Addr().String())
					require.NoError(t, err)
					defer queued.Close()
					late := newDeafClient(t, ln.Addr())
					var inherited net.Conn
					kill := func() {
						t.Helper()
						killWhileDraining(t, stop.name, ln, stop.v4)
						late.hear(t) // its connection is made while the stop is in force
						inherited = late.connected(t)
					}
					w := row.heal(t, stop.kernel(), ln, kill)
					if w == nil {
						return
					}
					require.Equal(t, way{0, 0, -1}, wayOf(t, w.intake.raw))
					for _, c := range []net.Conn{queued, inherited, dialed(t, w, 1)[0]} {
						s, err := w.Accept()
						require.NoError(t, err)
						defer s.Close()
						talk(t, c, s)
					}
				})
			}
		}
	})
}

// Two Listeners on one socket drain at the same time. Neither mistakes the stop of the
// other for an option of the user. A connection receives data on whichever Listener
// accepts it.
func TestTwoListenersDrainOneSocket(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		first := listen4(t, k)
		second, err := k.wrap(first.TCPListener())
		require.NoError(t, err)
		client := newDeafClient(t, first.Addr())
		one := inBackground(t, first, within(t, patience))
		untilStopped(t, first, v4)
		two := inBackground(t, second, within(t, patience))
		require.Eventually(t, func() bool {
			second.intake.mu.Lock()
			defer second.intake.mu.Unlock()
			return second.intake.running == 1
		}, patience, time.Millisecond)
		require.Equal(t, v4, wayOf(t, first.intake.raw), "one stop, not two")
		client.hear(t)
		c := client.connected(t)
		s, err := first.Accept()
		require.NoError(t, err)
		defer s.Close()
		talk(t, c, s)
		require.NoError(t, first.SetDeadline(time.Now()))
		_, err = first.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		// The second counts as shared, so it lets new clients in when it ends. If the first
		// ends later it notices that.
		if err := received(t, one); err != nil {
			requireStillOpen(t, err)
		}
		requireStillOpen(t, received(t, two))
		require.Equal(t, way{0, 0, -1}, wayOf(t, first.intake.raw))
	})
}

// gtsm is a minimum TTL that a user sets on the listener or on a connection.
const gtsm = 60

// After a drain whose stop was lifted, connections keep the options that the user sets on
// them or on the listener. Accept removes only the option of the drain, and only as long as
// connections can have inherited it.
func TestLiftedDrainUndoesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		var reads atomic.Int64
		read := k.getsockopt
		k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
			reads.Add(1)
			return read(fd, level, name, p)
		}
		getFilter := k.getFilter
		k.getFilter = func(fd int, p []unix.SockFilter) (int, error) {
			reads.Add(1)
			return getFilter(fd, p)
		}
		ln := listen4(t, k)
		require.NoError(t, ln.Drain(within(t, patience)))
		require.Equal(t, v4, wayOf(t, ln.intake.raw))
		require.NoError(t, ln.Resume())
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.raw))

		pass := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff}}
		require.NoError(t, ln.intake.raw.Control(func(fd uintptr) {
			require.NoError(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL, gtsm))
			require.NoError(t, realKernel.attachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass[0]}))
		}))
		accept := func(c net.Conn) {
			t.Helper()
			s, err := ln.AcceptTCP()
			require.NoError(t, err)
			defer s.Close()
			raw, err := s.SyscallConn()
			require.NoError(t, err)
			require.Equal(t, way{1, gtsm, -1}, wayOf(t, raw))
			talk(t, c, s)
		}
		dialed(t, ln, 2)
		for range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			c.Close()
		}
		forgotten := func() bool { return ln.intake.inherited.Load().over }
		require.Eventually(t, func() bool {
			accept(dialed(t, ln, 1)[0])
			return forgotten()
		}, patience, time.Millisecond, "the queue was seen empty, long after the lift")
		dialed(t, ln, 1)
		before := reads.Load()
		c, err := ln.Accept()
		require.NoError(t, err)
		c.Close()
		require.Equal(t, before, reads.Load(), "Accept must not read the option")
	})
}

// A call of Accept has taken a connection that was made during the stop. It must remove
// the inherited option, even if another call has seen an empty queue since.
func TestInheritanceIsKeptLongEnough(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		k := withoutFilter()
		ln := listen4(t, k)
		client := newDeafClient(t, ln.Addr())
		drained := inBackground(t, ln, within(t, 100*time.Millisecond))
		untilStopped(t, ln, way{0, maxTTL, -1})
		client.hear(t)
		c := client.connected(t)
		require.ErrorAs(t, received(t, drained), new(*DrainError))
		before := ln.intake.inherited.Load()
		s, err := ln.intake.tcp.AcceptTCP() // the first step of Accept, whose goroutine then does not run for a while
		require.NoError(t, err)
		defer s.Close()
		require.NoError(t, ln.Resume())
		require.Eventually(t, func() bool {
			dialed(t, ln, 1)
			other, err := ln.Accept()
			require.NoError(t, err)
			other.Close()
			return ln.intake.inherited.Load().over
		}, patience, time.Millisecond)
		ln.intake.removeStop(s, before)
		talk(t, c, s)
	})
}

// Reading the queue or setting options does not make a socket shared, even through a
// wrapper that forwards SyscallConn. An open duplicate of the descriptor does, however it
// was made. A duplicate that was closed again does not.
func TestSharedSocketIsDetected(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		keeps := func(kept *net.Listener, t *testing.T) Option {
			return WithControl(func(_, _ string, c syscall.RawConn) (err error) {
				*kept = duplicateUnbound(t, c)
				return nil
			})
		}
		for _, row := range []struct {
			name   string
			opts   func(t *testing.T) []Option
			do     func(t *testing.T, ln *Listener)
			shared bool
		}{
			{"nothing", nil, func(*testing.T, *Listener) {}, false},
			{"ReadStats of a wrapper", nil, func(t *testing.T, ln *Listener) {
				_, err := ReadStats(forwarding{ln})
				require.NoError(t, err)
			}, false},
			{"an option set through SyscallConn", nil, func(t *testing.T, ln *Listener) {
				raw, err := ln.SyscallConn()
				require.NoError(t, err)
				require.NoError(t, raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, 1) }))
			}, false},
			{"TCPListener", nil, func(t *testing.T, ln *Listener) { require.NotNil(t, ln.TCPListener()) }, false},
			{"WithControl", func(*testing.T) []Option { return []Option{withInt(unix.SOL_SOCKET, unix.SO_PRIORITY, 1)} },
				func(*testing.T, *Listener) {}, false},
			{"a duplicate that was passed on and closed, as tableflip does", nil, func(t *testing.T, ln *Listener) {
				raw, err := ln.SyscallConn()
				require.NoError(t, err)
				require.NoError(t, duplicate(t, raw).Close())
			}, true},
			{"an open duplicate", nil, func(t *testing.T, ln *Listener) {
				raw, err := ln.SyscallConn()
				require.NoError(t, err)
				other := duplicate(t, raw)
				t.Cleanup(func() { other.Close() })
			}, true},
			{"an open duplicate, made by a WithControl function", func(t *testing.T) []Option {
				var kept net.Listener
				t.Cleanup(func() { kept.Close() })
				return []Option{keeps(&kept, t)}
			}, func(*testing.T, *Listener) {}, true},
			{"File, closed again", nil, func(t *testing.T, ln *Listener) {
				f, err := ln.File()
				require.NoError(t, err)
				require.NoError(t, f.Close())
			}, true},
		} {
			for _, when := range []string{"before", "after"} {
				if when == "after" && row.opts != nil {
					continue // the WithControl function runs before
				}
				t.Run(row.name+", "+when, func(t *testing.T) {
					var opts []Option
					if row.opts != nil {
						opts = row.opts(t)
					}
					ln := listen4(t, k, opts...)
					if when == "before" {
						row.do(t, ln)
					}
					err := ln.Drain(within(t, patience))
					if when == "after" {
						require.NoError(t, err)
						row.do(t, ln)
					} else if row.shared {
						requireStillOpen(t, err)
					} else {
						require.NoError(t, err)
					}
					want := v4
					if row.shared {
						want = way{0, 0, -1}
					}
					require.Equal(t, want, wayOf(t, ln.intake.raw))
				})
			}
		}
		t.Run("the descriptors cannot be listed", func(t *testing.T) {
			blind := k
			blind.descriptors = func() (map[uint64]int, error) { return nil, unix.EMFILE }
			ln := listen4(t, blind)
			require.NoError(t, ln.Drain(within(t, patience)), "the caller has not seen the descriptor")
			require.NoError(t, ln.Resume())
			ln.TCPListener()
			requireStillOpen(t, ln.Drain(within(t, patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.raw))
		})
	})
}

// forwarding is a wrapper of another library that forwards SyscallConn.
type forwarding struct{ ln *Listener }

func (f forwarding) SyscallConn() (syscall.RawConn, error) { return f.ln.SyscallConn() }

// duplicateUnbound keeps a second descriptor of a socket that is not bound yet.
func duplicateUnbound(t *testing.T, raw syscall.RawConn) net.Listener {
	t.Helper()
	fd := -1
	require.NoError(t, raw.Control(func(own uintptr) { fd, _ = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }))
	require.Positive(t, fd)
	return keptDescriptor{os.NewFile(uintptr(fd), "kept")}
}

type keptDescriptor struct{ *os.File }

func (keptDescriptor) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }
func (keptDescriptor) Addr() net.Addr            { return nil }

// If the kernel refuses TCP_INFO, for example by seccomp, Drain returns an error and
// changes nothing on the socket.
func TestDrainThatCannotSeeTheQueueChangesNothing(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		ln := listen4(t, k)
		blind := k
		blind.getsockopt = func(fd, level, name int, p []byte) (int, error) {
			if name == unix.TCP_INFO {
				return 0, unix.EPERM
			}
			return k.getsockopt(fd, level, name, p)
		}
		ln.intake.kernel = &blind
		err := ln.Drain(within(t, patience))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.NotErrorIs(t, err, ErrStillOpen)
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.raw))
		ln.intake.kernel = &k
		dialed(t, ln, 1)
	})
}

// Resume lets new clients in again, after a drain and during a drain.
func TestResume(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		ln := listen4(t, k, withInt(unix.IPPROTO_IP, unix.IP_MINTTL, gtsm))
		former := way{0, gtsm, -1}
		stopped := v4.after(gtsm)
		require.NoError(t, ln.Resume(), "Resume without a drain must succeed")
		require.Equal(t, former, wayOf(t, ln.intake.raw))
		require.NoError(t, ln.Drain(within(t, patience)))
		require.Equal(t, stopped, wayOf(t, ln.intake.raw))
		require.NoError(t, ln.Resume())
		require.Equal(t, former, wayOf(t, ln.intake.raw))
		dialed(t, ln, 1)

		// Accept is not called, so these drains wait.
		one, two := inBackground(t, ln, within(t, patience)), inBackground(t, ln, within(t, patience))
		require.Eventually(t, func() bool {
			ln.intake.mu.Lock()
			defer ln.intake.mu.Unlock()
			return ln.intake.running == 2
		}, patience, time.Millisecond)
		require.NoError(t, ln.Resume())
		requireStillOpen(t, received(t, one))
		requireStillOpen(t, received(t, two))
		require.Equal(t, former, wayOf(t, ln.intake.raw))
		dialed(t, ln, 1)

		require.NoError(t, ln.Close())
		require.ErrorIs(t, ln.Resume(), net.ErrClosed)
	})
	var none *Listener
	require.ErrorIs(t, none.Resume(), syscall.EINVAL)
}

// As long as the queue holds connections that were made during the stop, Accept removes
// what they inherited, also long after Resume.
func TestInheritanceIsKeptWhileTheQueueHoldsSome(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		ln := listen4(t, withoutFilter())
		first, second := newDeafClient(t, ln.Addr()), newDeafClient(t, ln.Addr())
		drained := inBackground(t, ln, within(t, 500*time.Millisecond))
		untilStopped(t, ln, way{0, maxTTL, -1})
		clients := map[string]net.Conn{}
		for _, client := range []*deafClient{first, second} {
			client.hear(t)
			c := client.connected(t)
			clients[c.LocalAddr().String()] = c
		}
		require.ErrorAs(t, received(t, drained), new(*DrainError))
		require.NoError(t, ln.Resume())
		<-time.After(2 * inheritanceLast)
		for range 2 {
			s, err := ln.Accept()
			require.NoError(t, err)
			defer s.Close()
			talk(t, clients[s.RemoteAddr().String()], s)
		}
	})
}

// Control does not list the descriptors of the process. A drain does, once, when it ends.
// If that fails, the socket counts as shared for this drain only.
func TestControlListsNoDescriptors(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		lists, fails := 0, true
		sys := k
		sys.descriptors = func() (map[uint64]int, error) {
			if lists++; fails {
				return nil, unix.EMFILE
			}
			return k.descriptors()
		}
		ln := listen4(t, sys)
		for range 3 {
			_, err := ReadStats(forwarding{ln})
			require.NoError(t, err)
		}
		require.Zero(t, lists)
		requireStillOpen(t, ln.Drain(within(t, patience)))
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.raw))
		require.Equal(t, 1, lists)
		fails = false
		require.NoError(t, ln.Drain(within(t, patience)))
		require.Equal(t, v4, wayOf(t, ln.intake.raw))
	})
}
