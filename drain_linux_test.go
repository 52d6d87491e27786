package acceptq

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A drain waits for a handshake that was in flight when it began. The connection inherits
// the filter or minimum TTL of the drain, and Accept removes it. The first row, with net's
// own Accept, shows that the connection had inherited it.
func TestDrainedChildren(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
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
				drained := inBackground(t, ln, within(t, patience))
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
					talk(t, c, s)
				}
				// Call Accept again, so that the drain ends.
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.NoError(t, received(t, drained))
			})
		}
	})
}

// On a dual-stack socket Accept removes the inherited options from connections of both
// families.
func TestDrainedChildrenDualStack(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		t.Parallel()
		haveIPv6(t)
		ln, err := k.listenWith(t.Context(), "tcp", ":0", nil)
		require.NoError(t, err)
		defer ln.Close()
		port := ln.Addr().(*net.TCPAddr).Port
		var clients []*deafClient
		for _, ip := range []string{"127.0.0.1", "::1"} {
			clients = append(clients, newDeafClient(t, &net.TCPAddr{IP: net.ParseIP(ip), Port: port}))
		}
		drained := inBackground(t, ln, within(t, patience))
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
				talk(t, c, s)
			}
		}
		require.NoError(t, ln.SetDeadline(time.Now()))
		_, err = ln.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NoError(t, received(t, drained))
	})
}

// On a socket without another holder the stop stays until Close, even if ctx ends early.
// The kernel drops the SYN of a client that connects in that time. File lifts the stop.
func TestDrainedOwned(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		ln := listen4(t, k)
		former := wayOf(t, ln.raw)
		require.NoError(t, ln.Drain(within(t, patience)))
		require.Equal(t, v4, wayOf(t, ln.raw))
		require.NoError(t, ln.Drain(within(t, patience)), "again")
		require.Equal(t, v4, wayOf(t, ln.raw))

		s, err := ln.Stats()
		require.NoError(t, err)
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		_, err = d.Dial("tcp", ln.Addr().String())
		requireDropped(t, err)
		after, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, s.Drops+1, after.Drops)

		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		require.Equal(t, former, wayOf(t, ln.raw))
		dialed(t, ln, 1)
		early, cancel := context.WithCancel(t.Context())
		cancel()
		var de *DrainError
		require.ErrorAs(t, ln.Drain(early), &de)
		require.Equal(t, former, wayOf(t, ln.raw), "the options of a shared socket must be restored")
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
	c, err := net.DialTimeout("tcp", addr.String(), patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
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
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		file := func(t *testing.T, ln *Listener) net.Listener {
			f, err := ln.File()
			require.NoError(t, err)
			defer f.Close()
			other, err := net.FileListener(f)
			require.NoError(t, err)
			return other
		}
		drain := func(t *testing.T, ln *Listener) { requireStillOpen(t, ln.Drain(within(t, patience))) }
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
				require.NoError(t, ln.Drain(within(t, patience)))
				return file(t, ln)
			}},
			{"File during Drain", func(t *testing.T, ln *Listener, former int) net.Listener {
				dialed(t, ln, 1)
				drained := inBackground(t, ln, within(t, patience))
				untilStopped(t, ln, v4.after(former))
				other := file(t, ln)
				c, err := ln.Accept()
				require.NoError(t, err)
				defer c.Close()
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				requireStillOpen(t, received(t, drained))
				return other
			}},
			{"ctx ends early", func(t *testing.T, ln *Listener, _ int) net.Listener {
				other := file(t, ln)
				c := dialed(t, ln, 1)[0]
				require.ErrorIs(t, ln.Drain(within(t, 50*time.Millisecond)), context.DeadlineExceeded)
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
				wrapped, err := k.wrap(ln.TCPListener())
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
					require.Equal(t, way{0, former, -1}, wayOf(t, ln.raw))
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
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw))
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
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		t.Parallel()
		ln := listen4(t, k)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		other, err := net.FileListener(f)
		require.NoError(t, err)
		defer other.Close()
		client := newDeafClient(t, ln.Addr())
		drained := inBackground(t, ln, within(t, patience))
		untilStopped(t, ln, v4)
		client.hear(t)
		c := client.connected(t)
		s, err := other.Accept()
		require.NoError(t, err)
		defer s.Close()
		requireStillOpen(t, received(t, drained))
		if v4.ttl == maxTTL {
			_, err := c.Write([]byte("lost"))
			require.NoError(t, err)
			require.NoError(t, s.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
			_, err = s.Read(make([]byte, 4))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			raw, err := s.(*net.TCPConn).SyscallConn()
			require.NoError(t, err)
			require.NoError(t, setMinTTL(raw, 0))
			require.NoError(t, s.SetReadDeadline(time.Now().Add(patience)))
			_, err = io.ReadFull(s, make([]byte, 4)) // the client retransmits it
			require.NoError(t, err)
		}
		talk(t, c, s)
	})
}

// A drain neither changes nor removes the options that the user had set on the socket.
func TestDrainKeepsTheUsersOptions(t *testing.T) {
	accepting := WithControl(func(_, _ string, c syscall.RawConn) (err error) {
		pass := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff}}
		cerr := c.Control(func(fd uintptr) {
			err = realKernel.attachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass[0]})
		})
		return errors.Join(cerr, err)
	})
	require255 := withInt(unix.IPPROTO_IP, unix.IP_MINTTL, maxTTL)
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		for _, row := range []struct {
			name             string
			kernel           kernel
			opts             []Option
			former, stopped  way
			takesNoNewClient bool
		}{
			{"user filter: the drain uses the minimum TTL", realKernel, []Option{accepting}, way{1, 0, -1}, way{1, maxTTL, -1}, true},
			{"user minimum TTL of 255: the drain uses a filter", realKernel, []Option{require255}, way{0, maxTTL, -1}, way{len(dropSYN), maxTTL, -1}, true},
			{"user minimum TTL of 255, filter not permitted: new clients get in", withoutFilter(), []Option{require255}, way{0, maxTTL, -1}, way{0, maxTTL, -1}, false},
			{"user minimum TTL of 254, filter not permitted: clients send 255 and get in", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 254)}, way{0, 254, -1}, way{0, 254, -1}, false},
			{"user minimum TTL of 126, filter not permitted: the drain uses 129", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 126)}, way{0, 126, -1}, way{0, 129, -1}, true},
			{"user minimum TTL of 127, filter not permitted: 128 would stop no client that sends 128", withoutFilter(), []Option{withInt(unix.IPPROTO_IP, unix.IP_MINTTL, 127)}, way{0, 127, -1}, way{0, 127, -1}, false},
			{"user filter and minimum TTL of 255: new clients get in", realKernel, []Option{accepting, require255}, way{1, maxTTL, -1}, way{1, maxTTL, -1}, false},
		} {
			t.Run(row.name, func(t *testing.T) {
				ln := listen4(t, row.kernel, row.opts...)
				require.Equal(t, row.former, wayOf(t, ln.raw))
				d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) (err error) {
					cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 255) })
					return errors.Join(cerr, err)
				}}
				c, err := d.Dial("tcp", ln.Addr().String())
				require.NoError(t, err)
				defer c.Close()

				drained := inBackground(t, ln, within(t, patience))
				untilStopped(t, ln, row.stopped)
				s, err := ln.AcceptTCP()
				require.NoError(t, err)
				defer s.Close()
				raw, err := s.SyscallConn()
				require.NoError(t, err)
				require.Equal(t, row.former, wayOf(t, raw), "a connection from before the drain must keep the option")
				talk(t, c, s)
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				if err := received(t, drained); !row.takesNoNewClient {
					requireStillOpen(t, err)
				} else {
					require.NoError(t, err)

					d.Timeout, d.Control = 100*time.Millisecond, nil
					_, err := d.Dial("tcp", ln.Addr().String())
					requireDropped(t, err)
				}
				f, err := ln.File()
				require.NoError(t, err)
				f.Close()
				require.Equal(t, row.former, wayOf(t, ln.raw))
			})
		}
	})
}

// A drain can set no option on an MPTCP listener. It ends when the queue is empty.
func TestDrainMPTCP(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		inner, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
		require.NoError(t, err)
		ln, err := k.wrap(inner)
		require.NoError(t, err)
		defer ln.Close()
		if ln.transport != multipathTCP {
			t.Skip("no MPTCP here: sysctl -w net.mptcp.enabled=1, in a kernel that has it")
		}
		former := wayOf(t, ln.raw)
		dialed(t, ln, 2)

		err = ln.Drain(within(t, 50*time.Millisecond))
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 2, de.Queued)
		require.Equal(t, unknown, de.InFlight)

		drained := inBackground(t, ln, within(t, patience))
		for range 2 {
			require.Equal(t, former, wayOf(t, ln.raw))
			c, err := ln.Accept()
			require.NoError(t, err)
			c.Close()
		}
		require.NoError(t, ln.SetDeadline(time.Now()))
		_, err = ln.Accept()
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		requireStillOpen(t, received(t, drained))
		require.NoError(t, ln.SetDeadline(time.Time{}))
		require.Equal(t, former, wayOf(t, ln.raw))
		dialed(t, ln, 1) // new clients still get in
	})
}

// A drain waits for a peer that never finishes its handshake, but it stops waiting before
// ctx ends.
func TestDrainOfASilentPeer(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
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

				err = ln.Drain(within(t, 500*time.Millisecond))
				var de *DrainError
				require.ErrorAs(t, err, &de)
				require.Zero(t, de.Queued)
				require.Equal(t, 1, de.InFlight)

				began := time.Now()
				require.NoError(t, ln.Drain(within(t, patience)))
				require.GreaterOrEqual(t, time.Since(began), drainFlight)
				require.Equal(t, 1, synReceived(t, ln.Addr()), "the handshake must still be in flight")
			})
		}
	})
}

// Handshakes on another port, and later handshakes on another listener of this port, do
// not delay a drain.
func TestDrainOfOthersHandshakes(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		t.Parallel()
		other := listen4(t, k)
		newDeafClient(t, other.Addr())
		ln := listen4(t, k)
		began := time.Now()
		require.NoError(t, ln.Drain(within(t, patience)))
		require.Less(t, time.Since(began), drainFlight)

		for l, want := range map[*Listener]int{other: 1, ln: 0} {
			rows, err := newFlight(t.Context(), []*draining{{l: l}}).handshakes(t.Context())
			require.NoError(t, err)
			require.Len(t, rows, want)
		}
	})
}

// If a drain cannot read the handshakes in flight, it waits for the maximum time that it
// gives a handshake, and not longer.
func TestDrainWithoutDiag(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		handshake := aRow()
		failed := errors.New("no sock_diag")
		for _, test := range []struct {
			name       string
			dump       dumpCall
			incomplete int
		}{
			{"an error", func(context.Context, diagRequest, func(row) bool) ([]row, error) { return nil, failed }, unknown},
			{"an error after the first look", failingAfter(2, handshake, failed), unknown},
			{"a row that stays", listing(handshake), 1},
			{"a row that is too short", listing(handshake[:diagMsgSize-1]), unknown},
			{"an empty row", listing(nil), unknown},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				k := withoutFilter()
				k.dump = test.dump
				ln := listen4(t, k)
				err := ln.Drain(within(t, 500*time.Millisecond))
				var de *DrainError
				require.ErrorAs(t, err, &de)
				require.Zero(t, de.Queued)
				require.Equal(t, test.incomplete, de.InFlight)

				began := time.Now()
				require.NoError(t, ln.Drain(within(t, patience)))
				require.GreaterOrEqual(t, time.Since(began), drainFlight)
			})
		}
	})
}

// failingAfter returns a dump that succeeds n times, then fails.
func failingAfter(n int, handshake []byte, err error) dumpCall {
	var calls int
	return func(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
		if calls++; calls > n {
			return nil, err
		}
		return listing(handshake)(ctx, r, keep)
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
	k.setsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_IPV6 && value == maxTTL {
			return unix.EOPNOTSUPP
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln.kernel = &k
	err = ln.Drain(within(t, patience))
	requireStillOpen(t, err)
	require.ErrorIs(t, err, unix.EPERM, "the error of the filter")
	require.ErrorIs(t, err, unix.EOPNOTSUPP, "the error of the minimum TTL")
	require.Equal(t, way{0, 0, 0}, wayOf(t, ln.raw))
	require.Zero(t, option(t, ln, socketOption{unix.SOL_SOCKET, unix.SO_RXQ_OVFL}), "the mark")
	require.Nil(t, ln.intake.inherited.Load())
}

// A stop that cannot be lifted would leave the other holder without clients. Drain then
// returns an error, and the library tries again at each later call.
func TestStopThatCannotBeLiftedIsAnError(t *testing.T) {
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		fails := true
		set := k.setsockoptInt
		k.setsockoptInt = func(fd, level, name, value int) error {
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
			err := ln.Drain(within(t, patience))
			require.ErrorIs(t, err, unix.ENOMEM)
			requireDrainOp(t, err)
			require.Equal(t, v4, wayOf(t, ln.raw))
		}
		_, err = ln.File()
		require.ErrorIs(t, err, unix.ENOMEM)
		requireOp(t, err, "file")
		err = ln.Resume()
		require.ErrorIs(t, err, unix.ENOMEM)
		requireOp(t, err, "resume")

		fails = false
		require.NoError(t, ln.Resume())
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw))
		dialed(t, ln, 1)

		// Drain returns the error of ctx too.
		fails = true
		err = ln.Drain(within(t, 50*time.Millisecond))
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
	k.setsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_IP && value == 0 {
			return unix.ENOMEM
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln.kernel = &k
	require.NoError(t, ln.Drain(within(t, patience)))
	require.Equal(t, way{0, maxTTL, maxTTL}, wayOf(t, ln.raw))
	require.ErrorIs(t, ln.markShared(), unix.ENOMEM)
	require.Equal(t, way{0, maxTTL, 0}, wayOf(t, ln.raw))
}

// If the kernel answers every SYN with a cookie, a handshake in flight has no state. The
// filter lets the final ACKs pass, and the drain waits for them as long as for any
// handshake. The minimum TTL would drop them, so without a filter the drain lets new
// clients in and returns ErrStillOpen.
func TestDrainAndCookies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		setSysctl(t, "net.ipv4.tcp_syncookies", 2) // always
		defer setSysctl(t, "net.ipv4.tcp_syncookies", 1)
		const n = 50
		ln := listen4(t, k)
		var clients []net.Conn
		d := net.Dialer{Timeout: patience, Control: lateACK}
		for range n {
			c, err := d.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			clients = append(clients, c)
		}
		loop := serveEach(ln)
		if v4.ttl == maxTTL {
			requireStillOpen(t, ln.Drain(within(t, patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw), "the drain must set no option")
		}
		drained := inBackground(t, ln, within(t, patience))
		if v4.ttl != maxTTL {
			// A drain that ignores them would have ended before their final ACKs arrive.
			select {
			case <-time.After(100 * time.Millisecond):
			case err := <-drained:
				t.Fatal("the drain did not wait for the handshakes:", err)
			}
		}
		results := requestAll(clients)
		if err := received(t, drained); v4.ttl != maxTTL {
			require.NoError(t, err)
			require.NoError(t, ln.Close())
		}
		for range clients {
			require.NoError(t, received(t, results))
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
			c.SetDeadline(time.Now().Add(patience))
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
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		const n, limit = 40, 16
		before := kernelCounter(t, "TCPReqQFullDoCookies")
		ln := listen4(t, k, WithBacklog(limit))
		var clients []net.Conn
		d := net.Dialer{Timeout: 50 * time.Millisecond, Control: lateACK}
		for range n {
			if c, err := d.Dial("tcp", ln.Addr().String()); err == nil {
				clients = append(clients, c)
			}
		}
		results := requestAll(clients)
		require.Eventually(t, func() bool { return kernelQueue(t, ln.Addr()) == limit+1 }, patience, time.Millisecond)
		drained := inBackground(t, ln, within(t, patience))
		untilStopped(t, ln, v4)
		loop := serveEach(ln)
		require.NoError(t, received(t, drained))
		require.NoError(t, ln.Close())
		<-loop
		var lost int64
		for range clients {
			if received(t, results) != nil {
				lost++
			}
		}
		cookies := kernelCounter(t, "TCPReqQFullDoCookies") - before
		t.Logf("%d clients connected, %d of them by cookies, %d lost", len(clients), cookies, lost)
		require.Greater(t, cookies, int64(10))
		if v4.ttl != maxTTL {
			require.Zero(t, lost)
		}
		require.LessOrEqual(t, lost, cookies)
		require.GreaterOrEqual(t, int64(len(clients))-lost, int64(limit+1))
	})
}

// Calling Fd on a copy of the descriptor, as os/exec does, makes the socket blocking. A
// drain cannot interrupt Accept then. It still ends with ctx, and Accept continues.
func TestDrainOfABlockingSocket(t *testing.T) {
	ln := drainable(t)
	f, err := ln.File()
	require.NoError(t, err)
	defer f.Close()
	f.Fd()
	// If the test ends early, Close would wait forever for the accept(2) below.
	t.Cleanup(func() {
		if c, err := net.DialTimeout("tcp", ln.Addr().String(), patience); err == nil {
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
		ln.gate.mu.Lock()
		defer ln.gate.mu.Unlock()
		return ln.gate.inside == 1
	}
	require.Eventually(t, inside, patience, time.Millisecond)
	var de *DrainError
	require.ErrorAs(t, ln.Drain(within(t, 300*time.Millisecond)), &de)
	require.Equal(t, DrainError{HeldBack: unknown, err: context.DeadlineExceeded}, *de, "no connection is lost")
	// With more time the drain stops waiting for it: an Accept that does not return has no
	// connection to lose.
	requireStillOpen(t, ln.Drain(within(t, patience)))

	// Only a client can end the accept(2) that waits in the kernel.
	raw, err := f.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = unix.SetNonblock(int(fd), true) }))
	require.NoError(t, err)
	c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
	require.NoError(t, err)
	defer c.Close()
	(<-accepted).Close()
	require.Eventually(t, inside, patience, time.Millisecond)
	requireStillOpen(t, ln.Drain(within(t, patience)))
	require.NoError(t, ln.Close())
	_, open := <-accepted
	require.False(t, open)
}
