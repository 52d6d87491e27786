package acceptq

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

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
	require.ErrorIs(t, ln.Drain(nil), syscall.EINVAL) //nolint:staticcheck // the error of a nil context
	testkit.OnDescriptor(t, ln, func(fd int) (int, error) { return 0, unix.Shutdown(fd, unix.SHUT_RD) })
	require.ErrorIs(t, ln.Drain(testkit.Within(t, testkit.Patience)), syscall.EINVAL)
}
