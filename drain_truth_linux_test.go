package acceptq

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The promise of a drain: if it returns nil, Close resets nobody. Each test here failed
// before a defect was mended.

// lateClients connects n clients that hold their final ACK back until they send data.
func lateClients(t *testing.T, address string, n int) (clients []net.Conn) {
	t.Helper()
	d := net.Dialer{Timeout: patience, Control: lateACK}
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
	drained := inBackground(t, ln, within(t, patience))
	meanwhile()
	results := requestAll(clients)
	require.NoError(t, received(t, drained))
	require.NoError(t, ln.Close())
	<-served
	for range clients {
		require.NoError(t, received(t, results))
	}
}

// The kernel sent SYN cookies before the drain began, and the SYN queue is empty again. The
// drain cannot see these handshakes, so it waits for them.
func TestDrainAfterCookies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		if v4.ttl == maxTTL {
			t.Skip("a minimum TTL drops the final ACKs of handshakes with a cookie")
		}
		ln := listen4(t, k, WithBacklog(8))
		first := lateClients(t, ln.Addr().String(), 9) // they fill the SYN queue
		late := lateClients(t, ln.Addr().String(), 20)
		require.Positive(t, kernelCounter(t, "SyncookiesSent"))
		for _, c := range first { // they leave the SYN queue, and then the accept queue
			_, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			require.NoError(t, err)
			s, err := ln.Accept()
			require.NoError(t, err)
			s.Close()
		}
		require.Eventually(t, func() bool { return synReceived(t, ln.Addr()) == 0 }, patience, time.Millisecond)
		requireServed(t, ln, late, func() { <-time.After(100 * time.Millisecond) })
	})
}

// BPF can give a listener the clients of another port. Their handshakes are not listed under
// the port of the listener.
func TestDrainOfOtherPorts(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		ln := listen4(t, k)
		port := ln.Addr().(*net.TCPAddr).Port%60000 + 1
		steerPortTo(t, port, ln)
		address := fmt.Sprintf("127.0.0.1:%d", port)
		c, err := net.DialTimeout("tcp", address, patience)
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
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		setSysctl(t, "net.ipv4.tcp_syncookies", 2)
		k.readFile = func(name string) ([]byte, error) {
			if strings.HasPrefix(name, "/proc/sys/") {
				return nil, os.ErrNotExist
			}
			return os.ReadFile(name)
		}
		ln := listen4(t, k)
		late := lateClients(t, ln.Addr().String(), 10)
		if v4.ttl == maxTTL { // it would drop the final ACKs
			served := serveEach(ln)
			requireStillOpen(t, ln.Drain(within(t, patience)))
			require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw))
			ln.Close()
			<-served
			return
		}
		requireServed(t, ln, late, func() { <-time.After(100 * time.Millisecond) })
	})
}

// An option that the kernel refuses may be there. Only ENOPROTOOPT and EOPNOTSUPP mean that
// the socket does not have it.
func TestRefusedOptionIsNotAbsent(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		haveIPv6(t)
		for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
			k := withoutFilter()
			get := k.getsockoptInt
			k.getsockoptInt = func(fd, level, name int) (int, error) {
				if level == unix.IPPROTO_IP && name == unix.IP_MINTTL {
					return 0, errno
				}
				return get(fd, level, name)
			}
			ln, err := k.listenWith(t.Context(), "tcp", ":0", nil)
			require.NoError(t, err)
			err = ln.Drain(within(t, patience))
			requireStillOpen(t, err)
			require.ErrorIs(t, err, errno)
			require.Equal(t, way{0, 0, 0}, wayOf(t, ln.raw), "half a stop lets clients of one family in")
			require.NoError(t, ln.Close())
		}
	})
}

// With net.ipv4.tcp_migrate_req a connection can move from a listener that drained by a
// minimum TTL to any other member of the group. That member removes the minimum.
func TestMigratedConnectionsAreNotDeaf(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		for _, row := range []struct {
			name   string
			sysctl string // when it is set
			heir   func(t *testing.T, k *kernel) *Listener
		}{
			{"the sysctl is set after listen(2)", "later", func(t *testing.T, k *kernel) *Listener {
				l, err := k.listenWith(t.Context(), "tcp4", "127.0.0.1:0", []Option{WithReusePort()})
				require.NoError(t, err)
				return l
			}},
			{"a wrapped socket", "before", func(t *testing.T, k *kernel) *Listener {
				lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
					cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
					return errors.Join(cerr, err)
				}}
				lc.SetMultipathTCP(false)
				ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
				require.NoError(t, err)
				l, err := k.wrap(ln)
				require.NoError(t, err)
				return l
			}},
			{"the first of exclusive shards", "before", func(t *testing.T, k *kernel) *Listener {
				s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 2, nil)
				require.NoError(t, err)
				require.NoError(t, s.listeners[1].Close())
				return s.listeners[0]
			}},
		} {
			t.Run(row.name, func(t *testing.T) {
				k := withoutFilter()
				setSysctl(t, "net.ipv4.tcp_migrate_req", 0)
				if row.sysctl == "before" {
					setSysctl(t, "net.ipv4.tcp_migrate_req", 1)
				}
				heir := row.heir(t, &k)
				defer heir.Close()
				setSysctl(t, "net.ipv4.tcp_migrate_req", 1)
				old, err := k.listenWith(t.Context(), "tcp4", heir.Addr().String(), []Option{WithReusePort()})
				require.NoError(t, err)
				defer old.Close()
				var late []net.Conn // until some of their handshakes are with old
				for range 24 {
					late = append(late, lateClients(t, old.Addr().String(), 1)...)
				}
				drained := inBackground(t, old, within(t, 100*time.Millisecond))
				untilStopped(t, old, way{0, maxTTL, -1})
				for _, c := range late { // the final ACK
					_, err := c.Write([]byte{'x'})
					require.NoError(t, err)
				}
				require.ErrorAs(t, received(t, drained), new(*DrainError))
				require.NoError(t, old.Close())
				require.NoError(t, heir.SetDeadline(time.Now().Add(patience)))
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
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 3, nil)
		require.NoError(t, err)
		require.NoError(t, s.listeners[1].Close())
		require.NoError(t, s.Drain(within(t, patience)))
		require.Equal(t, v4, wayOf(t, s.listeners[0].raw))
		require.Equal(t, v4, wayOf(t, s.listeners[2].raw))
		require.NoError(t, s.Resume())
		require.ErrorIs(t, s.Close(), net.ErrClosed)
		require.ErrorIs(t, s.Drain(within(t, patience)), net.ErrClosed)
		require.ErrorIs(t, s.Resume(), net.ErrClosed)
	})
}

// A handshake of another address on the same port belongs to another listener.
func TestDrainCountsItsOwnAddress(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		ln := listen4(t, k)
		other, err := k.listenWith(t.Context(), "tcp4", fmt.Sprintf("127.0.0.2:%d", ln.Addr().(*net.TCPAddr).Port), nil)
		require.NoError(t, err)
		defer other.Close()
		newDeafClient(t, other.Addr())
		require.NoError(t, ln.Drain(within(t, drainFlight/2)))
		var left *DrainError
		require.ErrorAs(t, other.Drain(within(t, 100*time.Millisecond)), &left)
		require.Equal(t, 1, left.InFlight)
	})
}

// A shared socket lets clients in again also if ctx ends first, and the error says so.
func TestSharedDrainThatRunsOutSaysSo(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, _ way) {
		ln := listen4(t, k)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		dialed(t, ln, 1)
		err = ln.Drain(within(t, 50*time.Millisecond))
		require.ErrorAs(t, err, new(*DrainError))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, ErrStillOpen)
		require.ErrorIs(t, err, ErrShared)
		require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw))
	})
}

// The stop by a minimum TTL does not erase the minimum that the user has set, whatever
// removes the stop.
func TestWrapRestoresTheMinimumTTL(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		for _, minimum := range []int{0, 1, gtsm, mostTTL} {
			ln := listen4(t, withoutFilter(), withInt(unix.IPPROTO_IP, unix.IP_MINTTL, minimum))
			require.NoError(t, ln.Drain(within(t, patience)))
			require.Equal(t, way{0, maxTTL - minimum, -1}, wayOf(t, ln.raw))
			_, err := Wrap(ln.TCPListener()) // as another process does
			require.NoError(t, err)
			require.Equal(t, way{0, minimum, -1}, wayOf(t, ln.raw))
		}
	})
}

// Resume and File of another holder let clients in too.
func TestResumeOfAnHeir(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
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
				heir, err := k.wrap(ln.TCPListener())
				require.NoError(t, err)
				dialed(t, ln, 1)
				drained := inBackground(t, ln, within(t, patience))
				untilStopped(t, ln, v4)
				require.NoError(t, open(heir))
				require.Equal(t, way{0, 0, -1}, wayOf(t, ln.raw))
				s, err := ln.Accept()
				require.NoError(t, err)
				s.Close()
				require.NoError(t, ln.SetDeadline(time.Now()))
				ln.Accept()
				requireStillOpen(t, received(t, drained))
			})
		}
	})
}

// Resume of a shard that is drained already, while others still drain, is named as the
// reason.
func TestResumeOfAFinishedShard(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 2, nil)
		require.NoError(t, err)
		defer s.Close()
		c := dialUntil(t, s.listeners[1])
		defer c.Close()
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(within(t, 300*time.Millisecond)) }()
		untilStopped(t, s.listeners[0], v4)
		require.NoError(t, s.listeners[0].Resume())
		err = received(t, drained)
		require.ErrorIs(t, err, ErrStillOpen)
		require.NotErrorIs(t, err, ErrShared)
		require.ErrorIs(t, err, errResumed)
	})
}

// A loop that polls with deadlines does not stand in for a loop that is busy with its
// connection.
func TestDrainBesidePollingLoops(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		ln := listen4(t, realKernel)
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
		err = ln.Drain(within(t, drainReturn/2))
		var left *DrainError
		require.ErrorAs(t, err, &left)
		require.Equal(t, 1, left.Accepted)
		close(proceed)
		require.NoError(t, ln.Drain(within(t, patience)))
		require.NoError(t, ln.Close())
		loops.Wait()
	})
}

// Drain lists the errors that it returns.
func TestDrainErrorsAreListed(t *testing.T) {
	ln := listen4(t, realKernel)
	require.ErrorIs(t, ln.Drain(nil), syscall.EINVAL) //nolint:staticcheck // the error of a nil context
	onDescriptor(t, ln, func(fd int) (int, error) { return 0, unix.Shutdown(fd, unix.SHUT_RD) })
	require.ErrorIs(t, ln.Drain(within(t, patience)), syscall.EINVAL)
}

// The program for a close picks no listener that drains, whatever the order of the group and
// of the closes is, as long as it promises to be right.
func TestProgramIsRightWhileListenersClose(t *testing.T) {
	const drains, other, serves = 0, 1, 2
	for range 200 {
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
