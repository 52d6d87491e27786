package acceptq

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// aRow returns one handshake of a listener at 127.0.0.1 in the format of sock_diag.
func aRow() []byte {
	row := make([]byte, sockdiag.DiagMsgSize)
	row[sockdiag.DiagFamily] = unix.AF_INET
	copy(row[sockdiag.DiagSource:], []byte{127, 0, 0, 1})
	return row
}

// scripted returns a kernel whose listings of handshakes follow a script: rows[i] is
// the answer to look i, and the last answer is repeated.
func scripted(looks *atomic.Int64, rows ...[][]byte) sys.Calls {
	k := withoutFilter()
	k.Diag = func(request []byte) (sys.DiagAnswer, error) {
		i := looks.Add(1) - 1
		return testkit.Listing(rows[min(int(i), len(rows)-1)]...)(request)
	}
	return k
}

// Another processor may still be handling a SYN when the drain starts to drop SYNs. Its
// handshake shows only at the second look.
func TestDrainLooksTwiceForHandshakes(t *testing.T) {
	var looks atomic.Int64
	k := scripted(&looks, nil, [][]byte{aRow()})
	ln := listen4(t, k)
	err := ln.Drain(testkit.Within(t, 200*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.InFlight)

	// A handshake that first shows at the third look began after the drain.
	looks.Store(0)
	k = scripted(&looks, nil, nil, [][]byte{aRow()})
	ln = listen4(t, k)
	require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
}

// One look is not enough to conclude that no handshake is in flight, even if ctx ends
// after it.
func TestDrainIsNotSureAfterOneLook(t *testing.T) {
	var looks atomic.Int64
	k := scripted(&looks, nil)
	ctx, cancel := context.WithCancel(t.Context())
	read := k.Getsockopt
	k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
		if looks.Load() == 1 {
			cancel()
		}
		return read(fd, level, name, p)
	}
	ln := listen4(t, k)
	err := ln.Drain(ctx)
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, unknown, de.InFlight)
	require.EqualValues(t, 1, looks.Load())
}

// The kernel removes a handshake from its table a moment before it puts the connection
// into the queue. A single look between the two would see neither.
func TestDrainLooksAgainWhenAHandshakeHasEnded(t *testing.T) {
	var looks, queueReads atomic.Int64
	k := scripted(&looks, [][]byte{aRow()}, [][]byte{aRow()}, nil)
	read := k.Getsockopt
	k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
		n, err := read(fd, level, name, p)
		if name == unix.TCP_INFO && looks.Load() > 2 && queueReads.Add(1) > 1 {
			binary.NativeEndian.PutUint32(p[tcpinfo.Unacked:], 1) // the connection is in the queue now
		}
		return n, err
	}
	ln := listen4(t, k)
	err := ln.Drain(testkit.Within(t, 300*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.Queued)
	require.Greater(t, looks.Load(), int64(2), "the drain must have made all looks of the script")
}

// A connection can be made and accepted right after the drain has set an option on the
// socket. So the drain records before that what connections will inherit.
func TestInheritanceIsRecordedBeforeTheStop(t *testing.T) {
	var ln *Listener
	noted := false
	k := sys.Real
	k.AttachFilter = func(int, *unix.SockFprog) error {
		in := ln.intake.Inherited.Load()
		require.NotNil(t, in)
		require.True(t, in.Stop.Filter)
		return unix.EPERM
	}
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if value == intake.MaxTTL {
			in := ln.intake.Inherited.Load()
			require.NotNil(t, in)
			require.False(t, in.Stop.Filter)
			noted = true
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln = listen4(t, k)
	require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	require.True(t, noted)
}

// The kernel walks its whole table of sockets for each look, so shards share the looks.
func TestShardsShareTheLooksOfADrain(t *testing.T) {
	of := func(n int) int64 {
		var looks atomic.Int64
		k := scripted(&looks, nil)
		s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", n, nil)
		require.NoError(t, err)
		defer s.Close()
		require.NoError(t, s.Drain(testkit.Within(t, testkit.Patience)))
		return looks.Load()
	}
	require.EqualValues(t, 2, of(1), "a listener of one address has clients of one family")
	require.EqualValues(t, 2, of(64))
}

// When ctx ends, a drain abandons a slow look.
func TestDrainAbandonsASlowLook(t *testing.T) {
	k := withoutFilter()
	k.Diag = testkit.Answered(func([]byte) (int, error) {
		<-time.After(time.Millisecond)
		return 0, unix.EAGAIN
	})
	s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", 8, nil)
	require.NoError(t, err)
	defer s.Close()
	err = s.Drain(testkit.Within(t, 50*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, DrainError{InFlight: unknown, HeldBack: unknown, err: context.DeadlineExceeded}, *de)
}

// The clients of a single address belong to one family. Those of the wildcard can
// belong to both.
func TestFamilies(t *testing.T) {
	for address, want := range map[string][]uint8{
		"127.0.0.1":        {unix.AF_INET},
		"::1":              {unix.AF_INET6},
		"0.0.0.0":          {unix.AF_INET},
		"::":               {unix.AF_INET, unix.AF_INET6},
		"::ffff:127.0.0.1": {unix.AF_INET, unix.AF_INET6}, // an IPv6 socket whose clients use IPv4
	} {
		ip := netip.MustParseAddr(address)
		require.Equal(t, want, intake.Families(&net.TCPAddr{IP: ip.AsSlice()}), address)
	}
	require.Equal(t, []uint8{unix.AF_INET, unix.AF_INET6}, intake.Families(&net.TCPAddr{}))
}

// The drain of some shards succeeds and that of others fails. The error reports all of it.
func TestShardsDrainReportsEveryError(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		fails := true
		set := k.SetsockoptInt
		k.SetsockoptInt = func(fd, level, name, value int) error {
			if fails && value == 0 {
				return unix.ENOMEM
			}
			return set(fd, level, name, value)
		}
		s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", 4, nil)
		require.NoError(t, err)
		defer s.Close()
		f, err := shardsOf(s)[2].File()
		require.NoError(t, err)
		defer f.Close()

		c, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		queuedBecomes(t, 1, s.Stats)
		err = s.Drain(testkit.Within(t, 50*time.Millisecond))
		testkit.RequireDrainOp(t, err)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, unix.ENOMEM, "the third shard must still keep clients out")
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 1, de.Queued)

		require.ErrorIs(t, s.Resume(), unix.ENOMEM)
		fails = false
		require.NoError(t, s.Resume())
		for l := range s.All() {
			require.Equal(t, way{0, 0, -1}, wayOf(t, l.intake.Raw))
			if stats, err := l.Stats(); err == nil && stats.Queued > 0 {
				got, err := l.Accept()
				require.NoError(t, err)
				defer got.Close()
				require.NoError(t, l.SetDeadline(time.Now()))
				l.Accept()
			}
		}
		err = s.Drain(testkit.Within(t, testkit.Patience))
		requireStillOpen(t, err)
		require.Equal(t, v4, wayOf(t, shardsOf(s)[0].intake.Raw), "the other shards must keep clients out")
		require.Equal(t, way{0, 0, -1}, wayOf(t, shardsOf(s)[2].intake.Raw))
	})
}

// drainerEnv is set in a child process that drains an inherited socket until it is killed,
// with the filter or with the minimum TTL.
const drainerEnv = "ACCEPTQ_TEST_DRAINER"

// drainForever drains a queue from which no process accepts.
func drainForever(t *testing.T, k sys.Calls) {
	f := os.NewFile(3, "listener")
	inner, err := net.FileListener(f)
	require.NoError(t, err)
	f.Close()
	ln, err := wrap(&k, inner)
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
	require.Eventually(t, func() bool { return wayOf(t, raw) == want }, testkit.Patience, time.Millisecond)
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
	testkit.InNamespace(t, func(t *testing.T) {
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
				heal func(t *testing.T, k sys.Calls, ln *net.TCPListener, kill func()) *Listener
			}{
				{"control: the stop is not removed", func(t *testing.T, k sys.Calls, ln *net.TCPListener, kill func()) *Listener {
					_, err := wrap(&k, ln)
					require.NoError(t, err)
					kill()
					d := net.Dialer{Timeout: 100 * time.Millisecond}
					_, err = d.Dial("tcp", ln.Addr().String())
					testkit.RequireDropped(t, err)
					return nil
				}},
				{"Wrap", func(t *testing.T, k sys.Calls, ln *net.TCPListener, kill func()) *Listener {
					kill()
					w, err := wrap(&k, ln)
					require.NoError(t, err)
					return w
				}},
				{"the next drain", func(t *testing.T, k sys.Calls, ln *net.TCPListener, kill func()) *Listener {
					w, err := wrap(&k, ln)
					require.NoError(t, err)
					kill()
					require.ErrorAs(t, w.Drain(testkit.Within(t, 50*time.Millisecond)), new(*DrainError))
					return w
				}},
				{"Drain without permission for filters, then Resume", func(t *testing.T, _ sys.Calls, ln *net.TCPListener, kill func()) *Listener {
					unprivileged := withoutFilter()
					w, err := wrap(&unprivileged, ln)
					require.NoError(t, err)
					kill()
					require.ErrorAs(t, w.Drain(testkit.Within(t, 50*time.Millisecond)), new(*DrainError))
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
					require.Equal(t, way{0, 0, -1}, wayOf(t, w.intake.Raw))
					for _, c := range []net.Conn{queued, inherited, dialed(t, w, 1)[0]} {
						s, err := w.Accept()
						require.NoError(t, err)
						defer s.Close()
						testkit.Talk(t, c, s)
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
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		first := listen4(t, k)
		second, err := wrap(&k, first.TCPListener())
		require.NoError(t, err)
		client := newDeafClient(t, first.Addr())
		one := testkit.InBackground(t, first, testkit.Within(t, testkit.Patience))
		untilStopped(t, first, v4)
		two := testkit.InBackground(t, second, testkit.Within(t, testkit.Patience))
		require.Eventually(t, func() bool {
			second.intake.Mu.Lock()
			defer second.intake.Mu.Unlock()
			return second.intake.Running == 1
		}, testkit.Patience, time.Millisecond)
		require.Equal(t, v4, wayOf(t, first.intake.Raw), "one stop, not two")
		client.hear(t)
		c := client.connected(t)
		s, err := first.Accept()
		require.NoError(t, err)
		defer s.Close()
		testkit.Talk(t, c, s)
		require.NoError(t, first.SetDeadline(time.Now()))
		_, err = first.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		// The second counts as shared, so it lets new clients in when it ends. If the first
		// ends later it notices that.
		if err := testkit.Received(t, one); err != nil {
			requireStillOpen(t, err)
		}
		requireStillOpen(t, testkit.Received(t, two))
		require.Equal(t, way{0, 0, -1}, wayOf(t, first.intake.Raw))
	})
}

// gtsm is a minimum TTL that a user sets on the listener or on a connection.
const gtsm = 60

// After a drain whose stop was lifted, connections keep the options that the user sets on
// them or on the listener. Accept removes only the option of the drain, and only as long as
// connections can have inherited it.
func TestLiftedDrainUndoesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		var reads atomic.Int64
		read := k.Getsockopt
		k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
			reads.Add(1)
			return read(fd, level, name, p)
		}
		getFilter := k.GetFilter
		k.GetFilter = func(fd int, p []unix.SockFilter) (int, error) {
			reads.Add(1)
			return getFilter(fd, p)
		}
		ln := listen4(t, k)
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, v4, wayOf(t, ln.intake.Raw))
		require.NoError(t, ln.Resume())
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))

		pass := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff}}
		require.NoError(t, ln.intake.Raw.Control(func(fd uintptr) {
			require.NoError(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL, gtsm))
			require.NoError(t, sys.Real.AttachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass[0]}))
		}))
		accept := func(c net.Conn) {
			t.Helper()
			s, err := ln.AcceptTCP()
			require.NoError(t, err)
			defer s.Close()
			raw, err := s.SyscallConn()
			require.NoError(t, err)
			require.Equal(t, way{1, gtsm, -1}, wayOf(t, raw))
			testkit.Talk(t, c, s)
		}
		dialed(t, ln, 2)
		for range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			c.Close()
		}
		forgotten := func() bool { return ln.intake.Inherited.Load().Over }
		require.Eventually(t, func() bool {
			accept(dialed(t, ln, 1)[0])
			return forgotten()
		}, testkit.Patience, time.Millisecond, "the queue was seen empty, long after the lift")
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
	testkit.InNamespace(t, func(t *testing.T) {
		k := withoutFilter()
		ln := listen4(t, k)
		client := newDeafClient(t, ln.Addr())
		drained := testkit.InBackground(t, ln, testkit.Within(t, 100*time.Millisecond))
		untilStopped(t, ln, way{0, intake.MaxTTL, -1})
		client.hear(t)
		c := client.connected(t)
		require.ErrorAs(t, testkit.Received(t, drained), new(*DrainError))
		before := ln.intake.Inherited.Load()
		s, err := ln.intake.TCP.AcceptTCP() // the first step of Accept, whose goroutine then does not run for a while
		require.NoError(t, err)
		defer s.Close()
		require.NoError(t, ln.Resume())
		require.Eventually(t, func() bool {
			dialed(t, ln, 1)
			other, err := ln.Accept()
			require.NoError(t, err)
			other.Close()
			return ln.intake.Inherited.Load().Over
		}, testkit.Patience, time.Millisecond)
		ln.intake.RemoveStop(s, before)
		testkit.Talk(t, c, s)
	})
}

// Reading the queue or setting options does not make a socket shared, even through a
// wrapper that forwards SyscallConn. An open duplicate of the descriptor does, however it
// was made. A duplicate that was closed again does not.
func TestSharedSocketIsDetected(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
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
					err := ln.Drain(testkit.Within(t, testkit.Patience))
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
					require.Equal(t, want, wayOf(t, ln.intake.Raw))
				})
			}
		}
		t.Run("the descriptors cannot be listed", func(t *testing.T) {
			blind := k
			blind.Descriptors = func() (map[uint64]int, error) { return nil, unix.EMFILE }
			ln := listen4(t, blind)
			require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)), "the caller has not seen the descriptor")
			require.NoError(t, ln.Resume())
			ln.TCPListener()
			requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
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
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		ln := listen4(t, k)
		blind := k
		blind.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
			if name == unix.TCP_INFO {
				return 0, unix.EPERM
			}
			return k.Getsockopt(fd, level, name, p)
		}
		ln.intake.Calls = &blind
		err := ln.Drain(testkit.Within(t, testkit.Patience))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.NotErrorIs(t, err, ErrStillOpen)
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
		ln.intake.Calls = &k
		dialed(t, ln, 1)
	})
}

// Resume lets new clients in again, after a drain and during a drain.
func TestResume(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		ln := listen4(t, k, withInt(unix.IPPROTO_IP, unix.IP_MINTTL, gtsm))
		former := way{0, gtsm, -1}
		stopped := v4.after(gtsm)
		require.NoError(t, ln.Resume(), "Resume without a drain must succeed")
		require.Equal(t, former, wayOf(t, ln.intake.Raw))
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, stopped, wayOf(t, ln.intake.Raw))
		require.NoError(t, ln.Resume())
		require.Equal(t, former, wayOf(t, ln.intake.Raw))
		dialed(t, ln, 1)

		// Accept is not called, so these drains wait.
		one, two := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience)), testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		require.Eventually(t, func() bool {
			ln.intake.Mu.Lock()
			defer ln.intake.Mu.Unlock()
			return ln.intake.Running == 2
		}, testkit.Patience, time.Millisecond)
		require.NoError(t, ln.Resume())
		requireStillOpen(t, testkit.Received(t, one))
		requireStillOpen(t, testkit.Received(t, two))
		require.Equal(t, former, wayOf(t, ln.intake.Raw))
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
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen4(t, withoutFilter())
		first, second := newDeafClient(t, ln.Addr()), newDeafClient(t, ln.Addr())
		drained := testkit.InBackground(t, ln, testkit.Within(t, 500*time.Millisecond))
		untilStopped(t, ln, way{0, intake.MaxTTL, -1})
		clients := map[string]net.Conn{}
		for _, client := range []*deafClient{first, second} {
			client.hear(t)
			c := client.connected(t)
			clients[c.LocalAddr().String()] = c
		}
		require.ErrorAs(t, testkit.Received(t, drained), new(*DrainError))
		require.NoError(t, ln.Resume())
		<-time.After(2 * intake.InheritanceLast)
		for range 2 {
			s, err := ln.Accept()
			require.NoError(t, err)
			defer s.Close()
			testkit.Talk(t, clients[s.RemoteAddr().String()], s)
		}
	})
}

// Control does not list the descriptors of the process. A drain does, once, when it ends.
// If that fails, the socket counts as shared for this drain only.
func TestControlListsNoDescriptors(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		lists, fails := 0, true
		sys := k
		sys.Descriptors = func() (map[uint64]int, error) {
			if lists++; fails {
				return nil, unix.EMFILE
			}
			return k.Descriptors()
		}
		ln := listen4(t, sys)
		for range 3 {
			_, err := ReadStats(forwarding{ln})
			require.NoError(t, err)
		}
		require.Zero(t, lists)
		requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
		require.Equal(t, 1, lists)
		fails = false
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, v4, wayOf(t, ln.intake.Raw))
	})
}

// Regression tests: each test here failed before a defect of the drain was fixed. The
// defects were found by reviews that tried to break it.

// idle makes the accept loop of l return.
func idle(t *testing.T, l *Listener) {
	t.Helper()
	require.NoError(t, l.SetDeadline(time.Now()))
	require.Eventually(t, func() bool {
		l.intake.Gate.Mu.Lock()
		defer l.intake.Gate.Mu.Unlock()
		return l.intake.Gate.Inside == 0
	}, testkit.Patience, time.Millisecond)
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
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		members := newMembers(t, &calls, "127.0.0.1:0", 2)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		require.ErrorAs(t, l.Drain(testkit.Within(t, 200*time.Millisecond)), new(*DrainError))
		require.Zero(t, stalled(l.Addr().String(), 40), "of 40 clients, although another listener serves")
	})
}

// A second drain that fails must not remove the BPF program of the first drain, whether
// the first has succeeded or still runs.
func TestSecondDrainKeepsSteering(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		t.Run("the first has ended", func(t *testing.T) {
			members := newMembers(t, &calls, "127.0.0.1:0", 2)
			l := members[0].Listener
			require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
			require.Zero(t, stalled(l.Addr().String(), 20), "control")
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			require.Error(t, l.Drain(ctx))
			require.Zero(t, stalled(l.Addr().String(), 40))
			require.NoError(t, l.Resume())
			requireEven(t, shares(t, members, 200)) // Resume has removed the program
		})
		t.Run("the first runs", func(t *testing.T) {
			members := newMembers(t, &calls, "127.0.0.1:0", 3)
			l := members[0].Listener
			idle(t, l)
			c := dialUntil(t, l)
			defer c.Close()
			first := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
			require.Error(t, l.Drain(testkit.Within(t, 100*time.Millisecond)))
			require.Zero(t, stalled(l.Addr().String(), 40))
			require.NoError(t, l.SetDeadline(time.Time{}))
			go answerEach(l, func() {})
			require.NoError(t, testkit.Received(t, first))
		})
	})
}

// Wrap removes the filter or minimum TTL of a drain that is still running, because it
// looks like one that a dead process left behind. The drain must notice this and return
// ErrStillOpen: if it returned nil, Close could reset clients.
func TestDrainNoticesWrap(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, v4 way) {
		ln := listen4(t, calls)
		dialed(t, ln, 1)
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		untilStopped(t, ln, v4)
		_, err := wrap(&calls, ln.TCPListener())
		require.NoError(t, err)
		s, err := ln.Accept()
		require.NoError(t, err)
		s.Close()
		idle := func() {
			require.NoError(t, ln.SetDeadline(time.Now()))
			ln.Accept()
		}
		idle()
		err = testkit.Received(t, drained)
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

// With net.ipv4.tcp_migrate_req the kernel moves a queued connection to another process
// when its listener closes. The connection must be able to receive there, although it has
// inherited the minimum TTL of the drain.
func TestMigratedConnectionReceives(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		for _, stop := range stops {
			t.Run(stop.name, func(t *testing.T) {
				calls := stop.kernel()
				listen := func(address string) *Listener {
					l, err := listenWith(&calls, t.Context(), "tcp4", address, []Option{WithReusePort()})
					require.NoError(t, err)
					t.Cleanup(func() { l.Close() })
					return l
				}
				old := listen("127.0.0.1:0")
				client := newDeafClient(t, old.Addr())
				heir := listen(old.Addr().String())
				drained := testkit.InBackground(t, old, testkit.Within(t, 1500*time.Millisecond))
				untilStopped(t, old, stop.v4)
				client.hear(t)
				c := client.connected(t)
				require.ErrorAs(t, testkit.Received(t, drained), new(*DrainError))
				require.NoError(t, old.Close())
				require.NoError(t, heir.SetDeadline(time.Now().Add(testkit.Patience)))
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
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_synack_retries", 2) // the kernel gives up after 7 s
		ln := listenIPv4(t)
		newDeafClient(t, ln.Addr())
		dialed(t, ln, 1)
		ctx, cancel := context.WithCancel(t.Context())
		drained := testkit.InBackground(t, ln, ctx)
		untilStopped(t, ln, way{len(intake.DropSYN), 0, -1})
		require.Eventually(t, func() bool { return testkit.SynReceived(t, ln.Addr()) == 0 }, testkit.Patience, 10*time.Millisecond)
		<-time.After(3 * 20 * intake.DrainLook) // the drain looks at the handshakes again
		cancel()
		var de *DrainError
		require.ErrorAs(t, testkit.Received(t, drained), &de)
		require.Equal(t, 1, de.Queued)
		require.LessOrEqual(t, de.InFlight, 0, "the handshake has ended")
	})
}

// Linux before 5.3 can attach a BPF program but cannot detach it. A listener that resumes
// must get clients there too.
func TestResumeWithoutDetach(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		calls.DetachProgram = func(int) error { return unix.ENOPROTOOPT }
		members := newMembers(t, &calls, "127.0.0.1:0", 3)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 300))
	})
}

// Resume of one shard must keep the BPF program that steers clients away from the other
// shards.
func TestResumeOfOneShardKeepsSteering(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		old := newGeneration(t, &calls, "tcp4", "127.0.0.1:0", 3)
		next := newGeneration(t, &calls, "tcp4", old.shards.Addr().String(), 1)
		require.NoError(t, old.shards.Drain(testkit.Within(t, testkit.Patience)))
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

// withoutInode returns a datagram of a dump without the row of an inode, unless that is 0.
func withoutInode(p []byte, inode uint32) (left []byte) {
	for len(p) >= unix.SizeofNlMsghdr {
		size := min((int(binary.NativeEndian.Uint32(p))+3)&^3, len(p))
		row := p[unix.SizeofNlMsghdr:size]
		if inode == 0 || len(row) < sockdiag.DiagMsgSize || binary.NativeEndian.Uint32(row[sockdiag.DiagInode:]) != inode {
			left = append(left, p[:size]...)
		}
		p = p[size:]
	}
	return left
}

// A listing of the group can lack a row, if it takes several reads and a listener closes
// in between. Close must not panic then.
func TestCloseAfterAnIncompleteListing(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		var inode atomic.Uint32
		calls.Diag = func(request []byte) (sys.DiagAnswer, error) {
			answer, err := sys.Diag(request)
			receive := answer.Receive
			answer.Receive = func(p []byte) (int, error) {
				n, err := receive(p)
				if err != nil {
					return n, err
				}
				return copy(p, withoutInode(p[:n], inode.Load())), nil
			}
			return answer, err
		}
		old := newGeneration(t, &calls, "tcp4", "127.0.0.1:0", 3)
		next := newGeneration(t, &calls, "tcp4", old.shards.Addr().String(), 2)
		l := shardsOf(old.shards)[1]
		var stat unix.Stat_t
		require.NoError(t, l.intake.Raw.Control(func(fd uintptr) { unix.Fstat(int(fd), &stat) }))
		inode.Store(uint32(stat.Ino))
		require.NoError(t, old.shards.Drain(testkit.Within(t, testkit.Patience)))
		require.NotPanics(t, func() { old.shards.Close() })
		next.close(t)
	})
}

// Shards whose descriptors the caller has seen look for duplicates among all descriptors
// of the process. A drain must do this once for all shards, not once for each.
func TestShardsLookAtDescriptorsOnce(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
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
			err = s.Drain(testkit.Within(t, 50*time.Millisecond))
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
	testkit.InNamespace(t, func(t *testing.T) {
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
		err = s.Drain(testkit.Within(t, 500*time.Millisecond))
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
	testkit.InNamespace(t, func(t *testing.T) {
		s, err := ListenTCPShards("127.0.0.1:0", 32)
		require.NoError(t, err)
		var loops sync.WaitGroup
		for l := range s.All() {
			var operr error
			require.NoError(t, l.intake.Raw.Control(func(fd uintptr) { operr = unix.SetNonblock(int(fd), false) }))
			require.NoError(t, operr)
			loops.Go(func() { answerEach(l, func() {}) })
		}
		require.Eventually(t, func() bool {
			for l := range s.All() {
				l.intake.Gate.Mu.Lock()
				n := l.intake.Gate.Inside
				l.intake.Gate.Mu.Unlock()
				if n == 0 {
					return false
				}
			}
			return true
		}, testkit.Patience, time.Millisecond)
		began := time.Now()
		err = s.Drain(testkit.Within(t, 200*time.Millisecond))
		took := time.Since(began)
		for l := range s.All() { // end the blocking accept(2), so that Close can return
			l.intake.Raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RD) })
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
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		members := newMembers(t, &calls, "127.0.0.1:0", 2)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		first := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
		require.Error(t, l.Drain(testkit.Within(t, 100*time.Millisecond)))
		members = append(members, newMembers(t, &calls, l.Addr().String(), 1)...)
		// Call Accept again, so that the first drain ends.
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() { members[0].clients.Add(1) })
		require.NoError(t, testkit.Received(t, first))
		require.NoError(t, l.Resume())
		requireEven(t, shares(t, members, 300))
	})
}

// The same as TestCloseAfterAnIncompleteListing, with the real listing of the kernel,
// while other listeners of the address are opened and closed.
func TestSteeringWhileListenersOpenAndClose(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		panics, wrong := 0, 0
		tries := rounds(60)
		for range tries {
			func() {
				s, err := listenShards(&calls, t.Context(), "tcp4", "127.0.0.1:0", 64, []Option{WithReusePort()})
				require.NoError(t, err)
				var loops sync.WaitGroup
				for l := range s.All() {
					loops.Go(func() { answerEach(l, func() {}) })
				}
				defer loops.Wait()
				heir, err := listenShards(&calls, t.Context(), "tcp4", s.Addr().String(), 1, []Option{WithReusePort()})
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
						if third, err := listenShards(&calls, t.Context(), "tcp4", s.Addr().String(), 64, []Option{WithReusePort()}); err == nil {
							third.Close()
						}
					}
				})
				s.Drain(testkit.Within(t, testkit.Patience))
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
					l.intake.TCP.Close()
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
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		members := newMembers(t, &calls, "127.0.0.1:0", 1)
		l := members[0].Listener
		newDeafClient(t, l.Addr()) // the drain waits for it
		newMembers(t, &calls, l.Addr().String(), 1)
		var operr error
		require.NoError(t, l.intake.Raw.Control(func(fd uintptr) { operr = unix.SetNonblock(int(fd), false) }))
		require.NoError(t, operr)
		c := dialUntilAccepted(t, members[0]) // so its loop is in a blocking accept(2) now
		defer c.Close()
		drained := testkit.InBackground(t, l, testkit.Within(t, time.Second))
		untilStopped(t, l, way{len(intake.DropSYN), 0, -1})
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
		c, err := net.DialTimeout("tcp", m.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		c.SetReadDeadline(time.Now().Add(testkit.Patience))
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
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listenIPv4(t, WithBacklog(1))
		client := newDeafClient(t, ln.Addr())
		full := testkit.ConnectUntilFull(t, ln.Addr(), 10)
		require.NotEmpty(t, full)
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		untilStopped(t, ln, way{len(intake.DropSYN), 0, -1})
		client.hear(t)
		c := client.connected(t) // to the client: its final ACK was dropped by the full queue
		select {
		case err := <-drained:
			t.Fatalf("the drain has ended before the server was fast enough: %v", err)
		case <-time.After(intake.DrainFlight + 500*time.Millisecond):
		}
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
		err := testkit.Received(t, drained)
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
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		calls.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && name == unix.SO_NETNS_COOKIE {
				return 0, unix.ENOPROTOOPT
			}
			return sys.Getsockopt(fd, level, name, p)
		}
		other := testkit.NewVisited(t)
		var ln *Listener
		other.In(func() {
			var err error
			ln, err = listenWith(&calls, t.Context(), "tcp", "127.0.0.1:0", nil)
			require.NoError(t, err)
		})
		defer ln.Close()
		var fd int
		other.In(func() { fd = deafSocket(t, ln.Addr()) })
		began := time.Now()
		err := ln.Drain(testkit.Within(t, testkit.Patience))
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
	testkit.InNamespace(t, func(t *testing.T) {
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
		require.ErrorAs(t, ln.Drain(testkit.Within(t, 200*time.Millisecond)), &de, "a handshake is in flight")
		require.Equal(t, 1, de.InFlight)
	})
}

// A drain waits for a handshake that was in flight when it began. The connection inherits
// the filter or minimum TTL of the drain, and Accept removes it. The first row, with net's
// own Accept, shows that the connection had inherited it.
func TestDrainedChildren(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		t.Parallel()
		for _, row := range []struct {
			name   string
			accept func(*Listener) (net.Conn, error)
			want   way
			opts   []Option
		}{
			{"control: net's own Accept", func(ln *Listener) (net.Conn, error) { return ln.TCPListener().Accept() }, v4, nil},
			{"Accept", func(ln *Listener) (net.Conn, error) { return ln.Accept() }, way{0, 0, -1}, nil},
			{"AcceptTCP", func(ln *Listener) (net.Conn, error) { return ln.AcceptTCP() }, way{0, 0, -1}, nil},
			{"former minimum TTL", func(ln *Listener) (net.Conn, error) { return ln.Accept() }, way{0, 64, -1},
				[]Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 64)}},
		} {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				ln := listen4(t, k, row.opts...)
				client := newDeafClient(t, ln.Addr())
				drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
				stopped := v4
				if row.want != v4 { // the minimum TTL of the row is that of the user
					stopped = v4.after(row.want.ttl)
				}
				untilStopped(t, ln, stopped)
				require.Empty(t, drained, "a handshake is in flight")
				client.hear(t)
				c := client.connected(t)
				s, err := row.accept(ln)
				require.NoError(t, err)
				defer s.Close()
				raw, err := s.(*net.TCPConn).SyscallConn()
				require.NoError(t, err)
				require.Equal(t, row.want, wayOf(t, raw))
				if row.want != v4 {
					testkit.Talk(t, c, s)
				}
				// Call Accept again, so that the drain ends.
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.NoError(t, testkit.Received(t, drained))
			})
		}
	})
}

// On a dual-stack socket Accept removes the inherited options from connections of both
// families.
func TestDrainedChildrenDualStack(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		t.Parallel()
		haveIPv6(t)
		ln, err := listenWith(&k, t.Context(), "tcp", ":0", nil)
		require.NoError(t, err)
		defer ln.Close()
		port := ln.Addr().(*net.TCPAddr).Port
		var clients []*deafClient
		for _, ip := range []string{"127.0.0.1", "::1"} {
			clients = append(clients, newDeafClient(t, &net.TCPAddr{IP: net.ParseIP(ip), Port: port}))
		}
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		v6 := v4
		v6.hops = v6.ttl
		untilStopped(t, ln, v6)
		for _, client := range clients {
			client.hear(t)
			c := client.connected(t)
			s, err := ln.AcceptTCP()
			require.NoError(t, err)
			defer s.Close()
			raw, err := s.SyscallConn()
			require.NoError(t, err)
			require.Equal(t, way{0, 0, 0}, wayOf(t, raw))
			if c.LocalAddr().String() == s.RemoteAddr().String() {
				testkit.Talk(t, c, s)
			}
		}
		require.NoError(t, ln.SetDeadline(time.Now()))
		_, err = ln.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NoError(t, testkit.Received(t, drained))
	})
}

// On a socket without another holder the stop stays until Close, even if ctx ends early.
// The kernel drops the SYN of a client that connects in that time. File lifts the stop.
func TestDrainedOwned(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		ln := listen4(t, k)
		former := wayOf(t, ln.intake.Raw)
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, v4, wayOf(t, ln.intake.Raw))
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)), "again")
		require.Equal(t, v4, wayOf(t, ln.intake.Raw))

		s, err := ln.Stats()
		require.NoError(t, err)
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		_, err = d.Dial("tcp", ln.Addr().String())
		testkit.RequireDropped(t, err)
		after, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, s.Drops+1, after.Drops)

		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		require.Equal(t, former, wayOf(t, ln.intake.Raw))
		dialed(t, ln, 1)
		early, cancel := context.WithCancel(t.Context())
		cancel()
		var de *DrainError
		require.ErrorAs(t, ln.Drain(early), &de)
		require.Equal(t, former, wayOf(t, ln.intake.Raw), "the options of a shared socket must be restored")
	})
}

// heirEnv is set in a child process that has inherited the listening socket.
const heirEnv = "ACCEPTQ_TEST_HEIR"

// serveAsHeir answers each client until its standard input ends.
func serveAsHeir(t *testing.T) {
	f := os.NewFile(3, "listener")
	ln, err := net.FileListener(f)
	require.NoError(t, err)
	f.Close()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		ln.Close()
	}()
	answerAll(ln)
}

func answerAll(ln net.Listener) {
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		clients.Go(func() {
			defer c.Close()
			io.Copy(c, struct{ io.Reader }{c}) // otherwise net uses splice(2) and keeps a pipe
		})
	}
}

// requireReachable requires that a process at addr serves a client.
func requireReachable(t *testing.T, addr net.Addr) {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr.String(), testkit.Patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(testkit.Patience)))
	for range 2 {
		_, err = c.Write([]byte("word"))
		require.NoError(t, err)
		p := make([]byte, 4)
		_, err = io.ReadFull(c, p)
		require.NoError(t, err)
	}
}

// After a drain another holder finds the options of the socket restored, and its clients
// can connect.
func TestDrainedSecondHolder(t *testing.T) {
	if os.Getenv(heirEnv) != "" {
		serveAsHeir(t)
		return
	}
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		file := func(t *testing.T, ln *Listener) net.Listener {
			f, err := ln.File()
			require.NoError(t, err)
			defer f.Close()
			other, err := net.FileListener(f)
			require.NoError(t, err)
			return other
		}
		drain := func(t *testing.T, ln *Listener) { requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience))) }
		for _, row := range []struct {
			name string
			hold func(t *testing.T, ln *Listener, former int) net.Listener // also drains
		}{
			{"File, then Drain", func(t *testing.T, ln *Listener, _ int) net.Listener {
				other := file(t, ln)
				drain(t, ln)
				return other
			}},
			{"Drain, then File", func(t *testing.T, ln *Listener, _ int) net.Listener {
				require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
				return file(t, ln)
			}},
			{"File during Drain", func(t *testing.T, ln *Listener, former int) net.Listener {
				dialed(t, ln, 1)
				drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
				untilStopped(t, ln, v4.after(former))
				other := file(t, ln)
				c, err := ln.Accept()
				require.NoError(t, err)
				defer c.Close()
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				requireStillOpen(t, testkit.Received(t, drained))
				return other
			}},
			{"ctx ends early", func(t *testing.T, ln *Listener, _ int) net.Listener {
				other := file(t, ln)
				c := dialed(t, ln, 1)[0]
				require.ErrorIs(t, ln.Drain(testkit.Within(t, 50*time.Millisecond)), context.DeadlineExceeded)
				require.NoError(t, c.Close())
				return other
			}},
			{"a duplicate by SyscallConn that is kept", func(t *testing.T, ln *Listener, _ int) net.Listener {
				raw, err := ln.SyscallConn()
				require.NoError(t, err)
				other := duplicate(t, raw)
				drain(t, ln)
				return other
			}},
			{"a duplicate by TCPListener().File that is kept", func(t *testing.T, ln *Listener, _ int) net.Listener {
				f, err := ln.TCPListener().File()
				require.NoError(t, err)
				defer f.Close()
				other, err := net.FileListener(f)
				require.NoError(t, err)
				drain(t, ln)
				return other
			}},
			{"Wrap", func(t *testing.T, ln *Listener, _ int) net.Listener {
				f, err := ln.TCPListener().File()
				require.NoError(t, err)
				defer f.Close()
				other, err := net.FileListener(f)
				require.NoError(t, err)
				wrapped, err := wrap(&k, ln.TCPListener())
				require.NoError(t, err)
				drain(t, wrapped)
				return other
			}},
		} {
			for name, former := range map[string]int{"": 0, ", with a minimum TTL": 64} {
				t.Run(row.name+name, func(t *testing.T) {
					var opts []Option
					if former != 0 {
						opts = append(opts, withInt(unix.IPPROTO_IP, unix.IP_MINTTL, former))
					}
					ln := listen4(t, k, opts...)
					other := row.hold(t, ln, former)
					var answered sync.WaitGroup
					answered.Go(func() { answerAll(other) })
					require.Equal(t, way{0, former, -1}, wayOf(t, ln.intake.Raw))
					require.NoError(t, ln.Close())
					requireReachable(t, other.Addr())
					require.NoError(t, other.Close())
					answered.Wait()
				})
			}
		}
		t.Run("a child by exec", func(t *testing.T) {
			ln := listen4(t, k)
			f, err := ln.File()
			require.NoError(t, err)
			self, err := os.Executable()
			require.NoError(t, err)
			cmd := exec.Command(self, "-test.run=^TestDrainedSecondHolder$")
			cmd.Env = append(os.Environ(), heirEnv+"=1")
			cmd.ExtraFiles = []*os.File{f}
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			stdin, err := cmd.StdinPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			f.Close()
			drain(t, ln)
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
			require.NoError(t, ln.Close())
			requireReachable(t, ln.Addr())
			require.NoError(t, stdin.Close())
			require.NoError(t, cmd.Wait())
		})
	})
}

// If another holder accepts a connection that was made during a drain, the connection
// keeps the inherited option. A filter does not affect it. With the minimum TTL it receives
// nothing, as documented, until the holder resets the option.
func TestDrainedSecondHolderAccepts(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		t.Parallel()
		ln := listen4(t, k)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		other, err := net.FileListener(f)
		require.NoError(t, err)
		defer other.Close()
		client := newDeafClient(t, ln.Addr())
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		untilStopped(t, ln, v4)
		client.hear(t)
		c := client.connected(t)
		s, err := other.Accept()
		require.NoError(t, err)
		defer s.Close()
		requireStillOpen(t, testkit.Received(t, drained))
		if v4.ttl == intake.MaxTTL {
			_, err := c.Write([]byte("lost"))
			require.NoError(t, err)
			require.NoError(t, s.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
			_, err = s.Read(make([]byte, 4))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			raw, err := s.(*net.TCPConn).SyscallConn()
			require.NoError(t, err)
			require.NoError(t, testkit.SetMinTTL(raw, 0))
			require.NoError(t, s.SetReadDeadline(time.Now().Add(testkit.Patience)))
			_, err = io.ReadFull(s, make([]byte, 4)) // the client retransmits it
			require.NoError(t, err)
		}
		testkit.Talk(t, c, s)
	})
}

// A drain neither changes nor removes the options that the user had set on the socket.
func TestDrainKeepsTheUsersOptions(t *testing.T) {
	accepting := WithControl(func(_, _ string, c syscall.RawConn) (err error) {
		pass := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff}}
		cerr := c.Control(func(fd uintptr) {
			err = sys.Real.AttachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass[0]})
		})
		return errors.Join(cerr, err)
	})
	require255 := withInt(unix.IPPROTO_IP, unix.IP_MINTTL, intake.MaxTTL)
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, row := range []struct {
			name             string
			kernel           sys.Calls
			opts             []Option
			former, stopped  way
			takesNoNewClient bool
		}{
			{"user filter: the drain uses the minimum TTL", sys.Real, []Option{accepting}, way{1, 0, -1}, way{1, intake.MaxTTL, -1}, true},
			{"user minimum TTL of 255: the drain uses a filter", sys.Real, []Option{require255}, way{0, intake.MaxTTL, -1}, way{len(intake.DropSYN), intake.MaxTTL, -1}, true},
			{"user minimum TTL of 255, filter not permitted: new clients get in", withoutFilter(), []Option{require255}, way{0, intake.MaxTTL, -1}, way{0, intake.MaxTTL, -1}, false},
			{"user minimum TTL of 254, filter not permitted: clients send 255 and get in", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 254)}, way{0, 254, -1}, way{0, 254, -1}, false},
			{"user minimum TTL of 126, filter not permitted: the drain uses 129", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 126)}, way{0, 126, -1}, way{0, 129, -1}, true},
			{"user minimum TTL of 127, filter not permitted: 128 would stop no client that sends 128", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 127)}, way{0, 127, -1}, way{0, 127, -1}, false},
			{"user filter and minimum TTL of 255: new clients get in", sys.Real, []Option{accepting, require255}, way{1, intake.MaxTTL, -1}, way{1, intake.MaxTTL, -1}, false},
		} {
			t.Run(row.name, func(t *testing.T) {
				ln := listen4(t, row.kernel, row.opts...)
				require.Equal(t, row.former, wayOf(t, ln.intake.Raw))
				d := net.Dialer{Timeout: testkit.Patience, Control: func(_, _ string, c syscall.RawConn) (err error) {
					cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 255) })
					return errors.Join(cerr, err)
				}}
				c, err := d.Dial("tcp", ln.Addr().String())
				require.NoError(t, err)
				defer c.Close()

				drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
				untilStopped(t, ln, row.stopped)
				s, err := ln.AcceptTCP()
				require.NoError(t, err)
				defer s.Close()
				raw, err := s.SyscallConn()
				require.NoError(t, err)
				require.Equal(t, row.former, wayOf(t, raw), "a connection from before the drain must keep the option")
				testkit.Talk(t, c, s)
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				if err := testkit.Received(t, drained); !row.takesNoNewClient {
					requireStillOpen(t, err)
				} else {
					require.NoError(t, err)

					d.Timeout, d.Control = 100*time.Millisecond, nil
					_, err := d.Dial("tcp", ln.Addr().String())
					testkit.RequireDropped(t, err)
				}
				f, err := ln.File()
				require.NoError(t, err)
				f.Close()
				require.Equal(t, row.former, wayOf(t, ln.intake.Raw))
			})
		}
	})
}

// A drain can set no option on an MPTCP listener. It ends when the queue is empty.
func TestDrainMPTCP(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		inner, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
		require.NoError(t, err)
		ln, err := wrap(&k, inner)
		require.NoError(t, err)
		defer ln.Close()
		if ln.transport != multipathTCP {
			t.Skip("no MPTCP here: sysctl -w net.mptcp.enabled=1, in a kernel that has it")
		}
		former := wayOf(t, ln.intake.Raw)
		dialed(t, ln, 2)

		err = ln.Drain(testkit.Within(t, 50*time.Millisecond))
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 2, de.Queued)
		require.Equal(t, unknown, de.InFlight)

		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		for range 2 {
			require.Equal(t, former, wayOf(t, ln.intake.Raw))
			c, err := ln.Accept()
			require.NoError(t, err)
			c.Close()
		}
		require.NoError(t, ln.SetDeadline(time.Now()))
		_, err = ln.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		requireStillOpen(t, testkit.Received(t, drained))
		require.NoError(t, ln.SetDeadline(time.Time{}))
		require.Equal(t, former, wayOf(t, ln.intake.Raw))
		dialed(t, ln, 1) // new clients still get in
	})
}

// A drain waits for a peer that never finishes its handshake, but it stops waiting before
// ctx ends.
func TestDrainOfASilentPeer(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, network := range []string{"tcp4", "tcp6"} {
			t.Run(network, func(t *testing.T) {
				t.Parallel()
				address := "127.0.0.1:0"
				if network == "tcp6" {
					haveIPv6(t)
					address = "[::1]:0"
				}
				ln, err := Listen(t.Context(), network, address)
				require.NoError(t, err)
				defer ln.Close()
				newDeafClient(t, ln.Addr())

				err = ln.Drain(testkit.Within(t, 500*time.Millisecond))
				var de *DrainError
				require.ErrorAs(t, err, &de)
				require.Zero(t, de.Queued)
				require.Equal(t, 1, de.InFlight)

				began := time.Now()
				require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
				require.GreaterOrEqual(t, time.Since(began), intake.DrainFlight)
				require.Equal(t, 1, testkit.SynReceived(t, ln.Addr()), "the handshake must still be in flight")
			})
		}
	})
}

// Handshakes on another port, and later handshakes on another listener of this port, do
// not delay a drain.
func TestDrainOfOthersHandshakes(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		t.Parallel()
		other := listen4(t, k)
		newDeafClient(t, other.Addr())
		ln := listen4(t, k)
		began := time.Now()
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.Less(t, time.Since(began), intake.DrainFlight)

		for l, want := range map[*Listener]int{other: 1, ln: 0} {
			rows, err := intake.NewFlight(t.Context(), []*intake.Draining{{L: &l.intake}}).Handshakes(t.Context())
			require.NoError(t, err)
			require.Len(t, rows, want)
		}
	})
}

// If a drain cannot read the handshakes in flight, it waits for the maximum time that it
// gives a handshake, and not longer.
func TestDrainWithoutDiag(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		handshake := aRow()
		failed := errors.New("no sock_diag")
		for _, test := range []struct {
			name       string
			diag       testkit.DumpCall
			incomplete int
		}{
			{"an error", func(request []byte) (sys.DiagAnswer, error) { return sys.DiagAnswer{}, failed }, unknown},
			{"an error after the first look", failingAfter(2, handshake, failed), unknown},
			{"a row that stays", testkit.Listing(handshake), 1},
			{"a row that is too short", testkit.Listing(handshake[:sockdiag.DiagMsgSize-1]), unknown},
			{"an empty row", testkit.Listing(nil), unknown},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				k := withoutFilter()
				k.Diag = test.diag
				ln := listen4(t, k)
				err := ln.Drain(testkit.Within(t, 500*time.Millisecond))
				var de *DrainError
				require.ErrorAs(t, err, &de)
				require.Zero(t, de.Queued)
				require.Equal(t, test.incomplete, de.InFlight)

				began := time.Now()
				require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
				require.GreaterOrEqual(t, time.Since(began), intake.DrainFlight)
			})
		}
	})
}

// failingAfter returns a dump that succeeds n times, then fails.
func failingAfter(n int, handshake []byte, err error) testkit.DumpCall {
	var calls int
	return func(request []byte) (sys.DiagAnswer, error) {
		if calls++; calls > n {
			return sys.DiagAnswer{}, err
		}
		return testkit.Listing(handshake)(request)
	}
}

// If setting the second of two options fails, the first is restored.
func TestStopIsAtomic(t *testing.T) {
	ln, err := Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	defer ln.Close()
	k := withoutFilter()
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_IPV6 && value == intake.MaxTTL {
			return unix.EOPNOTSUPP
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln.intake.Calls = &k
	err = ln.Drain(testkit.Within(t, testkit.Patience))
	requireStillOpen(t, err)
	require.ErrorIs(t, err, unix.EPERM, "the error of the filter")
	require.ErrorIs(t, err, unix.EOPNOTSUPP, "the error of the minimum TTL")
	require.Equal(t, way{0, 0, 0}, wayOf(t, ln.intake.Raw))
	require.Zero(t, testkit.Option(t, ln, testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_RXQ_OVFL}), "the mark")
	require.Nil(t, ln.intake.Inherited.Load())
}

// A stop that cannot be lifted would leave the other holder without clients. Drain then
// returns an error, and the library tries again at each later call.
func TestStopThatCannotBeLiftedIsAnError(t *testing.T) {
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		fails := true
		set := k.SetsockoptInt
		k.SetsockoptInt = func(fd, level, name, value int) error {
			if fails && value == 0 { // restoring IP_MINTTL, and SO_DETACH_FILTER
				return unix.ENOMEM
			}
			return set(fd, level, name, value)
		}
		ln := listen4(t, k)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()

		for range 2 {
			err := ln.Drain(testkit.Within(t, testkit.Patience))
			require.ErrorIs(t, err, unix.ENOMEM)
			testkit.RequireDrainOp(t, err)
			require.Equal(t, v4, wayOf(t, ln.intake.Raw))
		}
		_, err = ln.File()
		require.ErrorIs(t, err, unix.ENOMEM)
		testkit.RequireOp(t, err, "file")
		err = ln.Resume()
		require.ErrorIs(t, err, unix.ENOMEM)
		testkit.RequireOp(t, err, "resume")

		fails = false
		require.NoError(t, ln.Resume())
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
		dialed(t, ln, 1)

		// Drain returns the error of ctx too.
		fails = true
		err = ln.Drain(testkit.Within(t, 50*time.Millisecond))
		require.ErrorIs(t, err, unix.ENOMEM)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// A dual-stack socket has two options. If the first cannot be restored, the second still
// is.
func TestStopIsLiftedAsFarAsPossible(t *testing.T) {
	ln, err := Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	defer ln.Close()
	k := withoutFilter()
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_IP && value == 0 {
			return unix.ENOMEM
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln.intake.Calls = &k
	require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	require.Equal(t, way{0, intake.MaxTTL, intake.MaxTTL}, wayOf(t, ln.intake.Raw))
	require.ErrorIs(t, ln.intake.MarkShared(), unix.ENOMEM)
	require.Equal(t, way{0, intake.MaxTTL, 0}, wayOf(t, ln.intake.Raw))
}

// If the kernel answers every SYN with a cookie, a handshake in flight has no state. The
// filter lets the final ACKs pass, and the drain waits for them as long as for any
// handshake. The minimum TTL would drop them, so without a filter the drain lets new
// clients in and returns ErrStillOpen.
func TestDrainAndCookies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2) // always
		defer testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 1)
		const n = 50
		ln := listen4(t, k)
		var clients []net.Conn
		d := net.Dialer{Timeout: testkit.Patience, Control: testkit.LateACK}
		for range n {
			c, err := d.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			clients = append(clients, c)
		}
		loop := serveEach(ln)
		if v4.ttl == intake.MaxTTL {
			requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw), "the drain must set no option")
		}
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		if v4.ttl != intake.MaxTTL {
			// A drain that ignores them would have ended before their final ACKs arrive.
			select {
			case <-time.After(100 * time.Millisecond):
			case err := <-drained:
				t.Fatal("the drain did not wait for the handshakes:", err)
			}
		}
		results := requestAll(clients)
		if err := testkit.Received(t, drained); v4.ttl != intake.MaxTTL {
			require.NoError(t, err)
			require.NoError(t, ln.Close())
		}
		for range clients {
			require.NoError(t, testkit.Received(t, results))
		}
		ln.Close()
		<-loop
	})
}

// serveEach answers one request of each connection until ln is closed.
func serveEach(ln net.Listener) (done chan struct{}) {
	done = make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(testkit.Patience))
			c.Read(make([]byte, 256))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nserved")
			c.Close()
		}
	}()
	return done
}

// requestAll sends a request on each connection.
func requestAll(conns []net.Conn) (results chan error) {
	results = make(chan error, len(conns))
	for _, c := range conns {
		go func() { results <- request(c) }()
	}
	return results
}

// The accept queue is full when a drain begins, and most clients have connected with a SYN
// cookie. They keep retransmitting their first data. With the filter none of them is lost.
// With the minimum TTL the clients with a cookie are lost.
func TestDrainOfAnOverflow(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		const n, limit = 40, 16
		before := testkit.KernelCounter(t, "TCPReqQFullDoCookies")
		ln := listen4(t, k, WithBacklog(limit))
		var clients []net.Conn
		d := net.Dialer{Timeout: 50 * time.Millisecond, Control: testkit.LateACK}
		for range n {
			if c, err := d.Dial("tcp", ln.Addr().String()); err == nil {
				clients = append(clients, c)
			}
		}
		results := requestAll(clients)
		require.Eventually(t, func() bool { return testkit.KernelQueue(t, ln.Addr()) > limit }, testkit.Patience, time.Millisecond)
		drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
		untilStopped(t, ln, v4)
		loop := serveEach(ln)
		require.NoError(t, testkit.Received(t, drained))
		require.NoError(t, ln.Close())
		<-loop
		var lost int64
		for range clients {
			if testkit.Received(t, results) != nil {
				lost++
			}
		}
		cookies := testkit.KernelCounter(t, "TCPReqQFullDoCookies") - before
		t.Logf("%d clients connected, %d of them by cookies, %d lost", len(clients), cookies, lost)
		require.Greater(t, cookies, int64(10))
		if v4.ttl != intake.MaxTTL {
			require.Zero(t, lost)
		}
		require.LessOrEqual(t, lost, cookies)
		require.GreaterOrEqual(t, int64(len(clients))-lost, int64(limit+1))
	})
}

// Calling Fd on a copy of the descriptor, as os/exec does, makes the socket blocking. A
// drain cannot interrupt Accept then. It still ends with ctx, and Accept continues.
func TestDrainOfABlockingSocket(t *testing.T) {
	t.Parallel()
	ln := drainable(t)
	f, err := ln.File()
	require.NoError(t, err)
	defer f.Close()
	f.Fd()
	// If the test ends early, Close would wait forever for the accept(2) below.
	t.Cleanup(func() {
		if c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience); err == nil {
			c.Close()
		}
	})
	accepted := make(chan net.Conn, 2)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	inside := func() bool {
		ln.intake.Gate.Mu.Lock()
		defer ln.intake.Gate.Mu.Unlock()
		return ln.intake.Gate.Inside == 1
	}
	require.Eventually(t, inside, testkit.Patience, time.Millisecond)
	var de *DrainError
	require.ErrorAs(t, ln.Drain(testkit.Within(t, 300*time.Millisecond)), &de)
	require.Equal(t, DrainError{HeldBack: unknown, err: context.DeadlineExceeded}, *de, "no connection is lost")
	// With more time the drain stops waiting for it: an Accept that does not return has no
	// connection to lose.
	requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))

	// Only a client can end the accept(2) that waits in the kernel.
	raw, err := f.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.SetNonblock(int(fd), true) }))
	require.NoError(t, err)
	c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
	require.NoError(t, err)
	defer c.Close()
	(<-accepted).Close()
	require.Eventually(t, inside, testkit.Patience, time.Millisecond)
	requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	require.NoError(t, ln.Close())
	_, open := <-accepted
	require.False(t, open)
}

// unprivilegedEnv is set in a test that runs without CAP_NET_ADMIN.
const unprivilegedEnv = "ACCEPTQ_TEST_UNPRIVILEGED"

// inNamespaceUnprivileged runs f in a new namespace, in a process that cannot regain
// CAP_NET_ADMIN. A program that root starts gets the capabilities in the bounding set
// of the starting thread. So the function removes the capability from that set and
// starts the test binary again.
func inNamespaceUnprivileged(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(unprivilegedEnv) != "" {
		f(t)
		return
	}
	testkit.InNamespace(t, func(t *testing.T) {
		self, err := os.Executable()
		require.NoError(t, err)
		cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=50s")
		cmd.Env = append(os.Environ(), unprivilegedEnv+"=1")
		type result struct {
			out []byte
			err error
		}
		done := make(chan result)
		go func() {
			runtime.LockOSThread() // never unlocked, because the thread has lost a capability
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0); err != nil {
				done <- result{err: err}
				return
			}
			out, err := cmd.CombinedOutput()
			done <- result{out, err}
		}()
		r := <-done
		t.Logf("without CAP_NET_ADMIN:\n%s", r.out)
		require.NoError(t, r.err)
		require.Contains(t, string(r.out), "--- PASS: "+t.Name())
	})
}

// restarts is one run: servers replace each other on one port under the load of a crowd.
type restarts struct {
	network, addr string
	dial          []string // the hosts that clients dial
	n             int
	slow          bool // requests take longer than a drain
	kernel        sys.Calls
	drain         bool // stop as documented; otherwise only Shutdown
	checkStop     func(t *testing.T, ln *Listener)
}

func (r restarts) run(t *testing.T) *crowd {
	t.Helper()
	var clients *crowd
	defer func() {
		if clients != nil {
			clients.end()
		}
	}()
	addr := r.addr
	began := time.Now()
	for i := range r.n {
		ln, err := listenWith(&r.kernel, t.Context(), r.network, addr, nil)
		require.NoError(t, err)
		addr = ln.Addr().String()
		var answered atomic.Int64
		busy := make(chan struct{})
		early := testkit.Unanswered{Conns: make(map[net.Conn]struct{})}
		srv := &http.Server{ConnState: early.Note, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if r.slow {
				<-time.After(60 * time.Millisecond)
			}
			io.WriteString(w, "served")
			if answered.Add(1) == 30 {
				close(busy)
			}
		})}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		if clients == nil {
			_, port, err := net.SplitHostPort(addr)
			require.NoError(t, err)
			var targets []string
			for _, host := range r.dial {
				targets = append(targets, net.JoinHostPort(host, port))
			}
			clients = newCrowd(64, targets...)
		}
		select {
		case <-busy:
		case <-time.After(20 * time.Second):
			t.Error("the server has answered too few requests")
		}
		if i == r.n-1 {
			clients.end()
		}

		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if r.drain {
			if err := ln.Drain(ctx); err != nil {
				t.Error(err)
			}
			if r.checkStop != nil {
				r.checkStop(t, ln)
			}
			for !early.None() && ctx.Err() == nil {
				<-time.After(time.Millisecond)
			}
		}
		if err := srv.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}
	c := clients
	clients = nil
	t.Logf("%d restarts in %v: %d answered, %d lost, the first: %v",
		r.n, time.Since(began).Round(time.Millisecond), c.ok.Load(), c.lost.Load(), c.firstFailure)
	return c
}

// These rows must pass with every way to keep new clients out. The handshakes of the
// clients take up to 30 ms.
func testDrainLosesNobody(t *testing.T, k sys.Calls, v4, v6 way) {
	blind := k
	blind.Diag = testkit.Listing() // sees only the queue

	// On a busy machine a control may lose few clients, or none, in a few restarts.
	losesMoreThan := func(t *testing.T, n int, r restarts) {
		for range 10 {
			if r.run(t).lost.Load() > int64(n) {
				return
			}
		}
		t.Errorf("the control has never lost more than %d", n)
	}
	t.Run("control: Shutdown alone", func(t *testing.T) {
		losesMoreThan(t, 5*rounds(40)/2, restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: rounds(40), kernel: k})
	})
	t.Run("control: a drain that reads only the queue", func(t *testing.T) {
		losesMoreThan(t, rounds(40), restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: rounds(40), kernel: blind, drain: true})
	})
	for _, row := range []struct {
		name     string
		restarts restarts
	}{
		{"IPv4", restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: rounds(40)}},
		{"slow requests", restarts{network: "tcp4", addr: "127.0.0.1:0", dial: []string{"127.0.0.1"}, n: rounds(8), slow: true}},
		{"IPv6", restarts{network: "tcp6", addr: "[::1]:0", dial: []string{"::1"}, n: rounds(10)}},
		{"dual-stack", restarts{network: "tcp", addr: ":0", dial: []string{"127.0.0.1", "::1"}, n: rounds(10)}},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := v4
			if row.restarts.network != "tcp4" {
				haveIPv6(t)
				want = v6
			}
			r := row.restarts
			r.kernel, r.drain = k, true
			r.checkStop = func(t *testing.T, ln *Listener) {
				if w := wayOf(t, ln.intake.Raw); w != want {
					t.Errorf("clients were kept out by %+v, want %+v", w, want)
				}
			}
			c := r.run(t)
			require.Zero(t, c.lost.Load(), c.firstFailure)
			require.GreaterOrEqual(t, c.ok.Load(), int64(30*r.n))
		})
	}
}

func TestDrainLosesNobody(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testDrainLosesNobody(t, sys.Real, way{len(intake.DropSYN), 0, -1}, way{len(intake.DropSYN), 0, 0})
	})
}

func TestDrainLosesNobodyUnprivileged(t *testing.T) {
	t.Parallel()
	inNamespaceUnprivileged(t, func(t *testing.T) {
		status, err := os.ReadFile("/proc/self/status")
		require.NoError(t, err)
		for line := range strings.Lines(string(status)) {
			if caps, ok := strings.CutPrefix(line, "CapEff:"); ok {
				var set uint64
				_, err := fmt.Sscanf(caps, "%x", &set)
				require.NoError(t, err)
				require.Zero(t, set&(1<<unix.CAP_NET_ADMIN), "still privileged")
			}
		}
		k := sys.Real
		if filterPermitted(t) {
			t.Log("this kernel is older than mid-2026 and lets any user set a filter: the test refuses it instead")
			k.AttachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
		}
		testDrainLosesNobody(t, k, way{0, 255, -1}, way{0, 255, 255})
	})
}

// filterPermitted reports whether this process can set a filter on a new socket.
func filterPermitted(t *testing.T) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	err = sys.Real.AttachFilter(fd, &unix.SockFprog{Len: uint16(len(intake.DropSYN)), Filter: &intake.DropSYN[0]})
	if err != nil {
		require.ErrorIs(t, err, unix.EPERM)
	}
	return err == nil
}

// With the minimum TTL a client that sends with a TTL of 255 gets in during the whole
// drain, and is served.
func TestDrainLetsTheHighestTTLIn(t *testing.T) {
	k := withoutFilter()
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", nil)
	require.NoError(t, err)
	defer ln.Close()
	require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
	d := net.Dialer{Timeout: testkit.Patience, Control: control255}
	c, err := d.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	accepted := testkit.AcceptBy(t, ln, ln.Accept)
	require.Equal(t, c.LocalAddr().String(), accepted.RemoteAddr().String())
	testkit.Talk(t, c, accepted)
}

// The promise of a drain: if it returns nil, Close resets nobody. Each test here failed
// before a defect was mended.

// lateClients connects n clients that hold their final ACK back until they send data.
func lateClients(t *testing.T, address string, n int) (clients []net.Conn) {
	t.Helper()
	d := net.Dialer{Timeout: testkit.Patience, Control: testkit.LateACK}
	for range n {
		c, err := d.Dial("tcp", address)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		clients = append(clients, c)
	}
	return clients
}

// requireServed lets clients send a request while ln drains, closes ln, and requires that
// each client has its answer.
func requireServed(t *testing.T, ln *Listener, clients []net.Conn, meanwhile func()) {
	t.Helper()
	served := serveEach(ln)
	drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
	meanwhile()
	results := requestAll(clients)
	require.NoError(t, testkit.Received(t, drained))
	require.NoError(t, ln.Close())
	<-served
	for range clients {
		require.NoError(t, testkit.Received(t, results))
	}
}

// The sys.Calls sent SYN cookies before the drain began, and the SYN queue is empty again. The
// drain cannot see these handshakes, so it waits for them.
func TestDrainAfterCookies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		if v4.ttl == intake.MaxTTL {
			t.Skip("a minimum TTL drops the final ACKs of handshakes with a cookie")
		}
		ln := listen4(t, k, WithBacklog(8))
		first := lateClients(t, ln.Addr().String(), 9) // they fill the SYN queue
		late := lateClients(t, ln.Addr().String(), 20)
		require.Positive(t, testkit.KernelCounter(t, "SyncookiesSent"))
		for _, c := range first { // they leave the SYN queue, and then the accept queue
			_, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			require.NoError(t, err)
			s, err := ln.Accept()
			require.NoError(t, err)
			s.Close()
		}
		require.Eventually(t, func() bool { return testkit.SynReceived(t, ln.Addr()) == 0 }, testkit.Patience, time.Millisecond)
		requireServed(t, ln, late, func() { <-time.After(100 * time.Millisecond) })
	})
}

// BPF can give a listener the clients of another port. Their handshakes are not listed under
// the port of the listener.
func TestDrainOfOtherPorts(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		ln := listen4(t, k)
		port := ln.Addr().(*net.TCPAddr).Port%60000 + 1
		steerPortTo(t, port, ln)
		address := fmt.Sprintf("127.0.0.1:%d", port)
		c, err := net.DialTimeout("tcp", address, testkit.Patience)
		require.NoError(t, err)
		s, err := ln.Accept() // the listener learns that it serves other ports
		require.NoError(t, err)
		s.Close()
		c.Close()
		late := lateClients(t, address, 10)
		requireServed(t, ln, late, func() { <-time.After(100 * time.Millisecond) })
	})
}

// If net.ipv4.tcp_syncookies cannot be read, it may be 2.
func TestDrainWithoutSettings(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2)
		k.ReadFile = func(name string) ([]byte, error) {
			if strings.HasPrefix(name, "/proc/sys/") {
				return nil, os.ErrNotExist
			}
			return os.ReadFile(name)
		}
		ln := listen4(t, k)
		late := lateClients(t, ln.Addr().String(), 10)
		if v4.ttl == intake.MaxTTL { // it would drop the final ACKs
			served := serveEach(ln)
			requireStillOpen(t, ln.Drain(testkit.Within(t, testkit.Patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
			ln.Close()
			<-served
			return
		}
		requireServed(t, ln, late, func() { <-time.After(100 * time.Millisecond) })
	})
}

// An option that the sys.Calls refuses may be there. Only ENOPROTOOPT and EOPNOTSUPP mean that
// the socket does not have it.
func TestRefusedOptionIsNotAbsent(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		haveIPv6(t)
		for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
			k := withoutFilter()
			get := k.GetsockoptInt
			k.GetsockoptInt = func(fd, level, name int) (int, error) {
				if level == unix.IPPROTO_IP && name == unix.IP_MINTTL {
					return 0, errno
				}
				return get(fd, level, name)
			}
			ln, err := listenWith(&k, t.Context(), "tcp", ":0", nil)
			require.NoError(t, err)
			err = ln.Drain(testkit.Within(t, testkit.Patience))
			requireStillOpen(t, err)
			require.ErrorIs(t, err, errno)
			require.Equal(t, way{0, 0, 0}, wayOf(t, ln.intake.Raw), "half a stop lets clients of one family in")
			require.NoError(t, ln.Close())
		}
	})
}

// With net.ipv4.tcp_migrate_req a connection can move from a listener that drained by a
// minimum TTL to any other member of the group. That member removes the minimum.
func TestMigratedConnectionsAreNotDeaf(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, row := range []struct {
			name   string
			sysctl string // when it is set
			heir   func(t *testing.T, k *sys.Calls) *Listener
		}{
			{"the sysctl is set after listen(2)", "later", func(t *testing.T, k *sys.Calls) *Listener {
				l, err := listenWith(k, t.Context(), "tcp4", "127.0.0.1:0", []Option{WithReusePort()})
				require.NoError(t, err)
				return l
			}},
			{"a wrapped socket", "before", func(t *testing.T, k *sys.Calls) *Listener {
				lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
					cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
					return errors.Join(cerr, err)
				}}
				lc.SetMultipathTCP(false)
				ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
				require.NoError(t, err)
				l, err := wrap(k, ln)
				require.NoError(t, err)
				return l
			}},
			{"the first of exclusive shards", "before", func(t *testing.T, k *sys.Calls) *Listener {
				s, err := listenShards(k, t.Context(), "tcp4", "127.0.0.1:0", 2, nil)
				require.NoError(t, err)
				require.NoError(t, s.listeners[1].Close())
				return s.listeners[0]
			}},
		} {
			t.Run(row.name, func(t *testing.T) {
				k := withoutFilter()
				testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 0)
				if row.sysctl == "before" {
					testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 1)
				}
				heir := row.heir(t, &k)
				defer heir.Close()
				testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 1)
				old, err := listenWith(&k, t.Context(), "tcp4", heir.Addr().String(), []Option{WithReusePort()})
				require.NoError(t, err)
				defer old.Close()
				var late []net.Conn // until some of their handshakes are with old
				for range 24 {
					late = append(late, lateClients(t, old.Addr().String(), 1)...)
				}
				drained := testkit.InBackground(t, old, testkit.Within(t, 100*time.Millisecond))
				untilStopped(t, old, way{0, intake.MaxTTL, -1})
				for _, c := range late { // the final ACK
					_, err := c.Write([]byte{'x'})
					require.NoError(t, err)
				}
				require.ErrorAs(t, testkit.Received(t, drained), new(*DrainError))
				require.NoError(t, old.Close())
				require.NoError(t, heir.SetDeadline(time.Now().Add(testkit.Patience)))
				for range late {
					s, err := heir.Accept()
					require.NoError(t, err)
					raw, err := s.(*net.TCPConn).SyscallConn()
					require.NoError(t, err)
					require.Equal(t, way{0, 0, -1}, wayOf(t, raw))
					s.Close()
				}
			})
		}
	})
}

// A shard that is closed is drained.
func TestDrainOfShardsWithoutOne(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", 3, nil)
		require.NoError(t, err)
		require.NoError(t, s.listeners[1].Close())
		require.NoError(t, s.Drain(testkit.Within(t, testkit.Patience)))
		require.Equal(t, v4, wayOf(t, s.listeners[0].intake.Raw))
		require.Equal(t, v4, wayOf(t, s.listeners[2].intake.Raw))
		require.NoError(t, s.Resume())
		require.ErrorIs(t, s.Close(), net.ErrClosed)
		require.ErrorIs(t, s.Drain(testkit.Within(t, testkit.Patience)), net.ErrClosed)
		require.ErrorIs(t, s.Resume(), net.ErrClosed)
	})
}

// A handshake of another address on the same port belongs to another listener.
func TestDrainCountsItsOwnAddress(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		ln := listen4(t, k)
		other, err := listenWith(&k, t.Context(), "tcp4", fmt.Sprintf("127.0.0.2:%d", ln.Addr().(*net.TCPAddr).Port), nil)
		require.NoError(t, err)
		defer other.Close()
		newDeafClient(t, other.Addr())
		require.NoError(t, ln.Drain(testkit.Within(t, intake.DrainFlight/2)))
		var left *DrainError
		require.ErrorAs(t, other.Drain(testkit.Within(t, 100*time.Millisecond)), &left)
		require.Equal(t, 1, left.InFlight)
	})
}

// A shared socket lets clients in again also if ctx ends first, and the error says so.
func TestSharedDrainThatRunsOutSaysSo(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		ln := listen4(t, k)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		dialed(t, ln, 1)
		err = ln.Drain(testkit.Within(t, 50*time.Millisecond))
		require.ErrorAs(t, err, new(*DrainError))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, ErrStillOpen)
		require.ErrorIs(t, err, ErrShared)
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
	})
}

// The stop by a minimum TTL does not erase the minimum that the user has set, whatever
// removes the stop.
func TestWrapRestoresTheMinimumTTL(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, minimum := range []int{0, 1, gtsm, 126} {
			ln := listen4(t, withoutFilter(), withInt(unix.IPPROTO_IP, unix.IP_MINTTL, minimum))
			require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
			require.Equal(t, way{0, intake.MaxTTL - minimum, -1}, wayOf(t, ln.intake.Raw))
			_, err := Wrap(ln.TCPListener()) // as another process does
			require.NoError(t, err)
			require.Equal(t, way{0, minimum, -1}, wayOf(t, ln.intake.Raw))
		}
	})
}

// Resume and File of another holder let clients in too.
func TestResumeOfAnHeir(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		for name, open := range map[string]func(heir *Listener) error{
			"Resume": (*Listener).Resume,
			"File": func(heir *Listener) error {
				f, err := heir.File()
				if err == nil {
					f.Close()
				}
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				ln := listen4(t, k)
				heir, err := wrap(&k, ln.TCPListener())
				require.NoError(t, err)
				dialed(t, ln, 1)
				drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
				untilStopped(t, ln, v4)
				require.NoError(t, open(heir))
				require.Equal(t, way{0, 0, -1}, wayOf(t, ln.intake.Raw))
				s, err := ln.Accept()
				require.NoError(t, err)
				s.Close()
				require.NoError(t, ln.SetDeadline(time.Now()))
				ln.Accept()
				requireStillOpen(t, testkit.Received(t, drained))
			})
		}
	})
}

// Resume of a shard that is drained already, while others still drain, is named as the
// reason.
func TestResumeOfAFinishedShard(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", 2, nil)
		require.NoError(t, err)
		defer s.Close()
		c := dialUntil(t, s.listeners[1])
		defer c.Close()
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(testkit.Within(t, 300*time.Millisecond)) }()
		untilStopped(t, s.listeners[0], v4)
		require.NoError(t, s.listeners[0].Resume())
		err = testkit.Received(t, drained)
		require.ErrorIs(t, err, ErrStillOpen)
		require.NotErrorIs(t, err, ErrShared)
	})
}

// A loop that polls with deadlines does not stand in for a loop that is busy with its
// connection.
func TestDrainBesidePollingLoops(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen4(t, sys.Real)
		busy, proceed := make(chan struct{}), make(chan struct{})
		var loops, begun sync.WaitGroup
		var once sync.Once
		begun.Add(2)
		for range 2 {
			loops.Go(func() {
				first := sync.OnceFunc(begun.Done)
				for {
					ln.SetDeadline(time.Now().Add(2 * time.Millisecond))
					c, err := ln.Accept()
					first() // a new loop could not be told apart from one that calls again
					if errors.Is(err, net.ErrClosed) {
						return
					}
					if err == nil {
						once.Do(func() { close(busy) })
						<-proceed
						c.Close()
					}
				}
			})
		}
		begun.Wait()
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		<-busy
		err = ln.Drain(testkit.Within(t, 500*time.Millisecond))
		var left *DrainError
		require.ErrorAs(t, err, &left)
		require.Equal(t, 1, left.Accepted)
		close(proceed)
		require.NoError(t, ln.Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, ln.Close())
		loops.Wait()
	})
}

// Drain lists the errors that it returns.
func TestDrainErrorsAreListed(t *testing.T) {
	ln := listen4(t, sys.Real)
	var none context.Context
	require.ErrorIs(t, ln.Drain(none), syscall.EINVAL)
	testkit.OnDescriptor(t, ln, func(fd int) (int, error) { return 0, unix.Shutdown(fd, unix.SHUT_RD) })
	require.ErrorIs(t, ln.Drain(testkit.Within(t, testkit.Patience)), syscall.EINVAL)
}
