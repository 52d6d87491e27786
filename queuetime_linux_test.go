package acceptq

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// tick is the period of the kernel's clock (CONFIG_HZ).
func tick(t testing.TB) time.Duration {
	t.Helper()
	var ts unix.Timespec
	require.NoError(t, unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &ts))
	require.NotZero(t, ts.Nano())
	return time.Duration(ts.Nano())
}

// now returns the time of the kernel's last tick. The kernel uses it for the timestamps of
// connections. On a busy virtual machine the tick can be late by more than its period.
func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// A wait is the interval in which the handshake of a queued connection ended, as far as the
// test knows.
type wait struct{ after, before time.Duration }

// requireTime reads how long c waited and compares it with w, with a tolerance of a
// tick and a half. It reads both clocks before and after the call, so a busy machine
// does not matter.
func (w wait) requireTime(t *testing.T, c net.Conn) (got time.Duration) {
	t.Helper()
	least := now() - w.before
	got, err := QueueTime(c)
	most := now() - w.after
	require.NoError(t, err)
	slack := tick(t) * 3 / 2
	require.GreaterOrEqual(t, got, least-slack, "it waited at least %v", least)
	require.LessOrEqual(t, got, most+slack, "it waited at most %v", most)
	return got
}

// join connects with dial and waits until the kernel has put the connection into the
// queue, as number n.
func joinQueue(t *testing.T, addr net.Addr, n int, dial func() (net.Conn, error)) (net.Conn, wait) {
	t.Helper()
	var w wait
	w.after = now()
	c, err := dial()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.Eventually(t, func() bool { return testkit.KernelQueue(t, addr) == n }, testkit.Patience, time.Millisecond)
	w.before = now()
	return c, w
}

func write(t *testing.T, c net.Conn) {
	t.Helper()
	_, err := io.WriteString(c, "data")
	require.NoError(t, err)
}

// awaitState waits until the peer of c is in the given TCP state.
func awaitState(t *testing.T, s *net.TCPConn, state uint8) {
	t.Helper()
	require.Eventually(t, func() bool { return testkit.TCPInfo(t, s).State == state }, testkit.Patience, time.Millisecond)
}

// QueueTime returns the wait, whatever the client does while it waits.
func TestQueueTimeIsTheWait(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, d := range []time.Duration{0, 5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 700 * time.Millisecond} {
			for name, do := range map[string]func(t *testing.T, c net.Conn){
				"silent": func(*testing.T, net.Conn) {},
				"sends":  write,
				"sends late": func(t *testing.T, c net.Conn) {
					time.Sleep(d / 2) // the test needs a wait
					write(t, c)
				},
				"closes": func(t *testing.T, c net.Conn) { require.NoError(t, c.Close()) },
				"sends and closes": func(t *testing.T, c net.Conn) {
					write(t, c)
					require.NoError(t, c.Close())
				},
				"resets": func(t *testing.T, c net.Conn) {
					require.NoError(t, c.(*net.TCPConn).SetLinger(0))
					require.NoError(t, c.Close())
				},
			} {
				for _, host := range []string{"127.0.0.1", "::1", "dual stack"} {
					t.Run(fmt.Sprintf("%v, %s, %s", d, name, host), func(t *testing.T) {
						t.Parallel()
						address := net.JoinHostPort(host, "0")
						if host == "dual stack" {
							address = ":0"
						}
						if host != "127.0.0.1" {
							haveIPv6(t)
						}
						ln, err := ListenTCP(address)
						require.NoError(t, err)
						defer ln.Close()
						to := ln.Addr().String()
						if host == "dual stack" {
							to = fmt.Sprintf("127.0.0.1:%d", ln.Addr().(*net.TCPAddr).Port)
						}
						c, w := joinQueue(t, ln.Addr(), 1, func() (net.Conn, error) { return net.DialTimeout("tcp", to, testkit.Patience) })
						begun := time.Now()
						do(t, c)
						time.Sleep(d - time.Since(begun)) // the test needs a wait
						s, err := ln.AcceptTCP()
						require.NoError(t, err)
						defer s.Close()
						switch name {
						case "closes", "sends and closes":
							awaitState(t, s, tcpinfo.CloseWait)
						case "resets":
							awaitState(t, s, 7)
						}
						got := w.requireTime(t, s)
						t.Logf("waited %v, read %v", now()-w.before, got)

						// Through a wrapper, such as TLS before its handshake.
						w.requireTime(t, tls.Server(s, &tls.Config{}))
						w.requireTime(t, struct{ *net.TCPConn }{s})
						w.requireTime(t, &embedded{Conn: embedded{Conn: s}})
					})
				}
			}
		}
	})
}

// With WithDeferAccept a connection begins to wait when its data arrive.
func TestQueueTimeOfDeferredAccept(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listenIPv4(t, WithDeferAccept(30*time.Second))
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		time.Sleep(50 * time.Millisecond) // the test needs a wait
		require.Zero(t, testkit.KernelQueue(t, ln.Addr()), "it is held back")
		_, w := joinQueue(t, ln.Addr(), 1, func() (net.Conn, error) {
			write(t, c)
			return c, nil
		})
		time.Sleep(50 * time.Millisecond)
		s, err := ln.AcceptTCP()
		require.NoError(t, err)
		defer s.Close()
		w.requireTime(t, s)
	})
}

// A connection whose handshake used a SYN cookie.
func TestQueueTimeOfACookie(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2) // always
		ln := listenIPv4(t)
		_, w := joinQueue(t, ln.Addr(), 1, func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) })
		require.NotZero(t, testkit.KernelCounter(t, "SyncookiesRecv"))
		time.Sleep(50 * time.Millisecond) // the test needs a wait
		s, err := ln.AcceptTCP()
		require.NoError(t, err)
		defer s.Close()
		w.requireTime(t, s)
	})
}

// If a listener closes and the kernel moves its connection to the queue of another
// listener, the time includes the wait in the first queue.
func TestQueueTimeOfAMigratedConnection(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", 1)
		first := listenIPv4(t, WithReusePort())
		_, w := joinQueue(t, first.Addr(), 1, func() (net.Conn, error) { return net.Dial("tcp", first.Addr().String()) })
		heir, err := ListenTCP(first.Addr().String(), WithReusePort())
		require.NoError(t, err)
		defer heir.Close()
		time.Sleep(50 * time.Millisecond) // the test needs a wait
		require.NoError(t, first.Close())
		all := waitingBecomes(t, 1, heir.Waiting)
		require.False(t, all[0].Shared, "the former listener is closed")
		s, err := heir.AcceptTCP()
		require.NoError(t, err)
		defer s.Close()
		w.requireTime(t, s)
	})
}

// fastOpen connects with data in the SYN. If deaf is set, the handshake does not end.
func fastOpen(t *testing.T, addr net.Addr, deaf bool) (fd int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	if deaf { // the minimum TTL of the client drops the SYN-ACK
		require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, intake.MaxTTL))
	}
	err = unix.Sendto(fd, []byte("data"), unix.MSG_FASTOPEN, &unix.SockaddrInet4{Port: addr.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}})
	require.True(t, err == nil || errors.Is(err, unix.EINPROGRESS), "%v", err)
	return fd
}

// A fast-open connection enters the queue when its SYN arrives. The kernel sets its
// timestamp again when its handshake ends.
func TestQueueTimeOfFastOpen(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 0x1|0x2|0x4|0x200) // both sides, without a cookie
		ln := listenIPv4(t, WithFastOpen(5))
		after := now()
		fd := fastOpen(t, ln.Addr(), true)
		require.Eventually(t, func() bool { return testkit.KernelQueue(t, ln.Addr()) == 1 }, testkit.Patience, time.Millisecond)
		w := wait{after: after, before: now()}
		time.Sleep(30 * time.Millisecond) // the test needs a wait
		s, err := ln.AcceptTCP()
		require.NoError(t, err)
		defer s.Close()
		require.EqualValues(t, tcpinfo.SynRecv, testkit.TCPInfo(t, s).State)
		w.requireTime(t, s)

		ends := now()
		require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, 0))
		awaitState(t, s, tcpinfo.Established)
		wait{after: ends, before: now()}.requireTime(t, s)
	})
}

// listenMPTCP listens as net.Listen does by default.
func listenMPTCP(t *testing.T) *Listener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(true)
	bare, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ln, err := Wrap(bare)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	if ln.transport != multipathTCP {
		t.Skip("no MPTCP here: sysctl -w net.mptcp.enabled=1, in a kernel that has it")
	}
	return ln
}

// A listener of net.Listen has one client with MPTCP and one without.
func TestQueueTimeOfMPTCP(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, client := range []bool{true, false} {
			t.Run(fmt.Sprint(client), func(t *testing.T) {
				ln := listenMPTCP(t)
				var d net.Dialer
				d.SetMultipathTCP(client)
				c, w := joinQueue(t, ln.Addr(), 1, func() (net.Conn, error) { return d.Dial("tcp", ln.Addr().String()) })
				write(t, c)
				time.Sleep(30 * time.Millisecond) // the test needs a wait
				s, err := ln.AcceptTCP()
				require.NoError(t, err)
				defer s.Close()
				multi, err := s.MultipathTCP()
				require.NoError(t, err)
				require.Equal(t, client, multi)
				w.requireTime(t, s)
				write(t, s)
				_, err = QueueTime(s)
				requireQueueTimeError(t, err, syscall.EINVAL)
			})
		}
	})
}

func requireQueueTimeError(t *testing.T, err, target error) {
	t.Helper()
	op, ok := err.(*net.OpError)
	require.True(t, ok, "%T", err)
	require.Equal(t, "queuetime", op.Op)
	require.ErrorIs(t, err, target)
}

// If the kernel does not report the wait, QueueTime returns an error and not a short time.
func TestQueueTimeErrors(t *testing.T) {
	ln := listenIPv4(t)
	dial := func(t *testing.T) (client, server *net.TCPConn) {
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		s, err := ln.AcceptTCP()
		require.NoError(t, err)
		t.Cleanup(func() { s.Close() })
		return c.(*net.TCPConn), s
	}
	for _, of := range []struct {
		name   string
		conn   func(t *testing.T) net.Conn
		target error
	}{
		{"dialed", func(t *testing.T) net.Conn { c, _ := dial(t); return c }, syscall.EINVAL},
		{"dialed, the other end has sent", func(t *testing.T) net.Conn {
			c, s := dial(t)
			write(t, s)
			_, err := io.ReadFull(c, make([]byte, 4))
			require.NoError(t, err)
			return c
		}, syscall.EINVAL},
		{"has sent", func(t *testing.T) net.Conn { _, s := dial(t); write(t, s); return s }, syscall.EINVAL},
		{"has ended its sending side", func(t *testing.T) net.Conn {
			_, s := dial(t)
			require.NoError(t, s.CloseWrite())
			awaitState(t, s, 5) // FIN_WAIT2: acknowledged
			return s
		}, syscall.EINVAL},
		{"closed", func(t *testing.T) net.Conn { _, s := dial(t); s.Close(); return s }, net.ErrClosed},
		{"nil", func(*testing.T) net.Conn { return nil }, syscall.EINVAL},
		{"a pipe", func(t *testing.T) net.Conn { c, s := net.Pipe(); c.Close(); s.Close(); return c }, syscall.EINVAL},
		{"an embedded pipe", func(t *testing.T) net.Conn { c, _ := net.Pipe(); return embedded{Conn: c} }, syscall.EINVAL},
		{"nothing is embedded", func(*testing.T) net.Conn { return nothing{} }, syscall.EINVAL},
		{"its addresses block", func(t *testing.T) net.Conn { return inert{t: t} }, syscall.EINVAL},
		{"a nil pointer", func(*testing.T) net.Conn { return (*nothing)(nil) }, syscall.EINVAL},
		{"it embeds itself", func(*testing.T) net.Conn { c := new(nothing); c.Conn = c; return c }, syscall.EINVAL},
		{"the field is deeper", func(t *testing.T) net.Conn { _, s := dial(t); return renamed{conn{s}} }, syscall.EINVAL},
		{"the field is no connection", func(*testing.T) net.Conn { return fieldOnly{Conn: "a name"} }, syscall.EINVAL},
		{"its own wrapper", func(t *testing.T) net.Conn { c := new(selfWrapped); c.Conn = c; return c }, syscall.EINVAL},
		{"TLS over a pipe", func(t *testing.T) net.Conn { c, _ := net.Pipe(); return tls.Server(c, &tls.Config{}) }, syscall.EINVAL},
		{"UDP", func(t *testing.T) net.Conn {
			c, err := net.Dial("udp", "127.0.0.1:9")
			require.NoError(t, err)
			t.Cleanup(func() { c.Close() })
			return c
		}, syscall.EINVAL},
		{"a unix socket", func(t *testing.T) net.Conn {
			path := t.TempDir() + "/socket"
			ln, err := net.Listen("unix", path)
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			c, err := net.Dial("unix", path)
			require.NoError(t, err)
			t.Cleanup(func() { c.Close() })
			return c
		}, syscall.EINVAL},
	} {
		t.Run(of.name, func(t *testing.T) {
			d, err := QueueTime(of.conn(t))
			require.EqualValues(t, -1, d)
			requireQueueTimeError(t, err, of.target)
		})
	}
}

// An embedded connection hides what it wraps, as that of netutil.LimitListener does.
type embedded struct {
	net.Conn
	_ sync.Once
}

// inert fails the test if its addresses are read.
type inert struct {
	net.Conn // nil
	t        *testing.T
}

func (c inert) LocalAddr() net.Addr  { return c.RemoteAddr() }
func (c inert) RemoteAddr() net.Addr { c.t.Error("this may block"); return nil }

// nothing has a field Conn.
type nothing struct{ net.Conn }

type conn struct{ net.Conn }

// renamed embeds a type that is not exported, so its field Conn is one of that type.
type renamed struct{ conn }

// fieldOnly has a field Conn of another type.
type fieldOnly struct {
	nothing
	Conn string
}

// A selfWrapped connection unwraps to itself.
type selfWrapped struct{ net.Conn }

func (c *selfWrapped) NetConn() net.Conn { return c }

// An older kernel returns a shorter structure, and gVisor returns zeros.
func TestQueueTimeOfOtherKernels(t *testing.T) {
	ln := listenIPv4(t)
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	s, err := ln.AcceptTCP()
	require.NoError(t, err)
	defer s.Close()

	const waited = 123
	info := make([]byte, tcpinfo.ConnEnd)
	info[tcpinfo.State] = tcpinfo.Established
	binary.NativeEndian.PutUint32(info[tcpinfo.SendMSS:], 536)
	binary.NativeEndian.PutUint32(info[tcpinfo.LastDataSent:], waited)
	with := func(change func(p []byte)) []byte {
		p := bytes.Clone(info)
		change(p)
		return p
	}
	acked := with(func(p []byte) { binary.NativeEndian.PutUint64(p[tcpinfo.BytesAcked:], 1) })
	sent := with(func(p []byte) { binary.NativeEndian.PutUint32(p[tcpinfo.DataSegsOut:], 1) })
	for _, row := range []struct {
		name   string
		n      int
		info   []byte
		target error
	}{
		{"whole", tcpinfo.ConnEnd, info, nil},
		{"Linux 4.1: data_segs_out is missing", tcpinfo.DataSegsOut, sent, nil},
		{"Linux 4.1, acknowledged", tcpinfo.DataSegsOut, acked, syscall.EINVAL},
		{"Linux 3.2: bytes_acked is missing", 104, acked, nil},
		{"the shortest usable answer", tcpinfo.LastDataSent + 4, info, nil},
		{"one byte less than that", tcpinfo.LastDataSent + 3, info, errors.ErrUnsupported},
		{"nothing", 0, info, errors.ErrUnsupported},
		{"negative", -1, info, errors.ErrUnsupported},
		{"longer than the buffer", 1 << 20, info, nil},
		{"zeros", tcpinfo.ConnEnd, make([]byte, tcpinfo.ConnEnd), errors.ErrUnsupported},
		{"gVisor's: a state and zeros", tcpinfo.ConnEnd, with(func(p []byte) { p[tcpinfo.SendMSS], p[tcpinfo.SendMSS+1] = 0, 0 }), errors.ErrUnsupported},
		{"sent, not yet acknowledged", tcpinfo.ConnEnd, sent, syscall.EINVAL},
		{"a listener", tcpinfo.ConnEnd, with(func(p []byte) { p[tcpinfo.State] = tcpinfo.Listen }), errors.ErrUnsupported},
		{"connecting", tcpinfo.ConnEnd, with(func(p []byte) { p[tcpinfo.State] = tcpinfo.SynSent }), syscall.EINVAL},
		{"an unknown state", tcpinfo.ConnEnd, with(func(p []byte) { p[tcpinfo.State] = 77 }), errors.ErrUnsupported},
	} {
		t.Run(row.name, func(t *testing.T) {
			k := sys.Real
			answers(row.n, nil, row.info...)(&k)
			d, err := queueTimeOf(&k, s)
			if row.target != nil {
				requireQueueTimeError(t, err, row.target)
				require.EqualValues(t, -1, d)
				return
			}
			require.NoError(t, err)
			require.Equal(t, waited*time.Millisecond, d)
		})
	}
	for _, errno := range []unix.Errno{unix.EPERM, unix.ENOPROTOOPT, unix.EBADF} {
		k := sys.Real
		answers(0, errno)(&k)
		_, err := queueTimeOf(&k, s)
		requireQueueTimeError(t, err, errno)
		testkit.RequireLayers(t, err, "tcp", "getsockopt")
	}
}

// Under load QueueTime returns the right time for each of many connections.
func TestQueueTimeUnderLoad(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		const clients, each = 32, 20
		ln := listenIPv4(t, WithBacklog(clients))
		var begun sync.Map // when a client began to connect, by its address
		slack := tick(t) * 3 / 2
		type finding struct {
			client string
			at     time.Duration
			waited time.Duration
			err    error
		}
		found := make(chan finding, clients*each)
		srv := &http.Server{
			ConnContext: func(ctx context.Context, c net.Conn) context.Context {
				d, err := QueueTime(c)
				found <- finding{c.RemoteAddr().String(), now(), d, err}
				return ctx
			},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }),
		}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		var running sync.WaitGroup
		for range clients {
			running.Go(func() {
				for range each {
					start := now()
					c, err := net.Dial("tcp", ln.Addr().String())
					if err != nil {
						t.Error(err)
						return
					}
					begun.Store(c.LocalAddr().String(), start)
					if err := request(c); err != nil {
						t.Error(err)
					}
				}
			})
		}
		running.Wait()
		require.NoError(t, srv.Close())
		require.ErrorIs(t, <-served, http.ErrServerClosed)
		close(found)
		n := 0
		for f := range found {
			require.NoError(t, f.err)
			start, ok := begun.Load(f.client)
			require.True(t, ok)
			require.LessOrEqual(t, f.waited, f.at-start.(time.Duration)+slack)
			n++
		}
		require.Equal(t, clients*each, n)
	})
}

func TestQueueTimeDoesNotAllocate(t *testing.T) {
	if testkit.RaceDetector {
		t.Skip("the race detector allocates")
	}
	ln := listenIPv4(t)
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	s, err := ln.Accept()
	require.NoError(t, err)
	defer s.Close()
	wrapped := net.Conn(&embedded{Conn: s})
	for name, conn := range map[string]net.Conn{"TCP": s, "TLS": tls.Server(s, &tls.Config{})} {
		require.Zero(t, testing.AllocsPerRun(1000, func() {
			if _, err := QueueTime(conn); err != nil {
				t.Error(err)
			}
		}), name)
	}
	require.LessOrEqual(t, testing.AllocsPerRun(1000, func() {
		if _, err := QueueTime(wrapped); err != nil {
			t.Error(err)
		}
	}), 1.0, "the index of the field")
}

// BenchmarkQueueTime compares QueueTime with the bare system call.
func BenchmarkQueueTime(b *testing.B) {
	const calls = 1000
	ln := listenForStats(b)
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(b, err)
	defer c.Close()
	s, err := ln.AcceptTCP()
	require.NoError(b, err)
	defer s.Close()
	b.Run("alone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := QueueTime(s); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("beside its system call", func(b *testing.B) {
		testkit.OnDescriptor(b, s, func(fd int) (int, error) {
			var p [tcpinfo.ConnEnd]byte
			raw := testkit.Repeat(calls, func() {
				if _, err := sys.Getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p[:]); err != nil {
					panic(err)
				}
			})
			r := testkit.Ratios(b, raw, raw, testkit.Repeat(calls, func() { QueueTime(s) }))
			b.ReportMetric(r[0], "raw/raw")
			b.ReportMetric(r[1], "queuetime/raw")
			return 0, nil
		})
	})
}
