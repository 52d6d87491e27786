package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// An effect describes what one option changes on the sockets of the kernel.
type effect struct {
	option               string
	opt                  acceptq.Option
	read                 func(t *testing.T, c syscall.Conn) int
	onListener, accepted int // the results of read; unchanged means the same as without the option
}

const unchanged = -1

func intOption(level, name int) func(*testing.T, syscall.Conn) int {
	return func(t *testing.T, c syscall.Conn) int {
		return testkit.Option(t, c, testkit.SocketOption{Level: level, Name: name})
	}
}

// effects has every option whose effect can be read from a socket on Linux. The kernel
// reports twice the requested buffer size, socket(7).
func effects() []effect {
	return []effect{
		{"WithBacklog", acceptq.WithBacklog(7), func(t *testing.T, c syscall.Conn) int {
			return int(testkit.TCPInfo(t, c).Sacked) // the limit on a listener, 0 on a connection
		}, 7, unchanged},
		{"WithReusePort", acceptq.WithReusePort(), intOption(unix.SOL_SOCKET, unix.SO_REUSEPORT), 1, 1},
		{"WithControl", acceptq.WithControl(freeBind), intOption(unix.IPPROTO_IP, unix.IP_FREEBIND), 1, 1},
		{"WithDeferAccept", acceptq.WithDeferAccept(10 * time.Second), intOption(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT), 15, unchanged},
		{"WithFastOpen", acceptq.WithFastOpen(9), intOption(unix.IPPROTO_TCP, unix.TCP_FASTOPEN), 9, unchanged},
		{"WithReceiveBuffer", acceptq.WithReceiveBuffer(50_000), intOption(unix.SOL_SOCKET, unix.SO_RCVBUF), 100_000, 100_000},
		{"WithSendBuffer", acceptq.WithSendBuffer(60_000), intOption(unix.SOL_SOCKET, unix.SO_SNDBUF), 120_000, 120_000},
		{"WithKeepAlive", acceptq.WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: 33 * time.Second}),
			intOption(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), unchanged, 33},
	}
}

func freeBind(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
	return errors.Join(cerr, err)
}

// Each option has the effect of the table on the listening socket and on its connections.
// A listener without the option has other values.
func TestOptionOnTheSocket(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 3)
		plain := listen(t)
		plainConn := acceptOne(t, plain, plain.Accept)
		for _, e := range effects() {
			t.Run(e.option, func(t *testing.T) {
				plainListener, plainAccepted := e.read(t, plain), e.read(t, plainConn)
				require.True(t, e.onListener != unchanged || e.accepted != unchanged)
				require.NotEqual(t, e.onListener, plainListener, "the value must differ from a listener without the option")
				require.NotEqual(t, e.accepted, plainAccepted, "the value must differ from a connection without the option")

				ln := listen(t, e.opt)
				c := acceptOne(t, ln, ln.Accept)
				require.Equal(t, instead(e.onListener, plainListener), e.read(t, ln))
				require.Equal(t, instead(e.accepted, plainAccepted), e.read(t, c))
			})
		}
	})
}

// Any two options work together.
func TestOptionPairs(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 3)
		plain := listen(t)
		plainConn := acceptOne(t, plain, plain.Accept)
		all := append(effects(), effect{option: "WithStrictBacklog", opt: acceptq.WithStrictBacklog(),
			read: func(*testing.T, syscall.Conn) int { return 0 }, onListener: unchanged, accepted: unchanged})
		for i, a := range all {
			for _, b := range all[i+1:] {
				t.Run(a.option+" and "+b.option, func(t *testing.T) {
					ln := listen(t, b.opt, a.opt)
					c := acceptOne(t, ln, ln.Accept)
					for _, e := range []effect{a, b} {
						require.Equal(t, instead(e.onListener, e.read(t, plain)), e.read(t, ln), e.option)
						require.Equal(t, instead(e.accepted, e.read(t, plainConn)), e.read(t, c), e.option)
					}
				})
			}
		}
	})
}

// If an option is given twice, the later one applies.
func TestOptionGivenTwice(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 3)
		idle := func(s int) acceptq.Option {
			return acceptq.WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Duration(s) * time.Second})
		}
		first := map[string]acceptq.Option{
			"WithBacklog":       acceptq.WithBacklog(3),
			"WithDeferAccept":   acceptq.WithDeferAccept(time.Second),
			"WithFastOpen":      acceptq.WithFastOpen(3),
			"WithReceiveBuffer": acceptq.WithReceiveBuffer(1 << 30), // an error if given alone
			"WithSendBuffer":    acceptq.WithSendBuffer(20_000),
			"WithKeepAlive":     idle(3),
		}
		for _, e := range effects() {
			if first[e.option] == nil {
				continue // it has no value
			}
			t.Run(e.option, func(t *testing.T) {
				ln := listen(t, first[e.option], e.opt)
				c := acceptOne(t, ln, ln.Accept)
				if e.onListener != unchanged {
					require.Equal(t, e.onListener, e.read(t, ln))
				}
				if e.accepted != unchanged {
					require.Equal(t, e.accepted, e.read(t, c))
				}
			})
		}
	})
}

// Listeners with the option share the address, and each gets clients. A listener without
// it cannot listen there.
func TestReusePortSpreads(t *testing.T) {
	a := listen(t, acceptq.WithReusePort())
	b, err := acceptq.ListenTCP(a.Addr().String(), acceptq.WithReusePort())
	require.NoError(t, err)
	defer b.Close()
	_, err = acceptq.ListenTCP(a.Addr().String())
	require.ErrorIs(t, err, syscall.EADDRINUSE)

	queued := func(l *acceptq.Listener) int {
		s, err := l.Stats()
		require.NoError(t, err)
		return s.Queued
	}
	const clients = 100 // all go to one side once in 2^99 runs
	for range clients {
		testkit.Dial(t, a.Addr())
	}
	require.Eventually(t, func() bool { return queued(a)+queued(b) == clients }, 10*time.Second, time.Millisecond)
	require.Positive(t, queued(a))
	require.Positive(t, queued(b))
}

// The duration is rounded up and never becomes 0. A duration that is too long is an error.
func TestDeferAcceptRounds(t *testing.T) {
	for d, want := range map[time.Duration]int{
		1: 1, time.Second: 1, time.Second + 1: 3, 3 * time.Second: 3, 10 * time.Second: 15, 16 * time.Second: 31,
	} {
		ln := listen(t, acceptq.WithDeferAccept(d))
		require.Equal(t, want, testkit.Option(t, ln, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_DEFER_ACCEPT}), d)
	}
	ln := listen(t, acceptq.WithDeferAccept(8*time.Hour))
	require.GreaterOrEqual(t, testkit.Option(t, ln, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_DEFER_ACCEPT}), 8*3600)
	for _, d := range []time.Duration{24 * time.Hour, (1<<32 + 5) * time.Second, math.MaxInt64 - 1, math.MaxInt64} {
		refusedWith(t, errors.ErrUnsupported, acceptq.WithDeferAccept(d))
	}
}

// With the option a silent client does not enter the accept queue, but a client that sends
// data does. Without the option the silent client is accepted at once.
func TestDeferAcceptActs(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		plain := listen(t)
		silent := testkit.Dial(t, plain.Addr())
		require.Equal(t, silent.LocalAddr(), testkit.AcceptBy(t, plain, plain.Accept).RemoteAddr())
		require.Zero(t, testkit.KernelCounter(t, "TCPDeferAcceptDrop"))

		ln := listen(t, acceptq.WithDeferAccept(time.Minute))
		silent = testkit.Dial(t, ln.Addr())
		require.Eventually(t, func() bool { return testkit.KernelCounter(t, "TCPDeferAcceptDrop") == 1 }, 10*time.Second, time.Millisecond,
			"the kernel should ignore the ACK without data")
		require.Zero(t, testkit.KernelQueue(t, ln.Addr()))
		speaker := testkit.Dial(t, ln.Addr())
		_, err := speaker.Write([]byte("x"))
		require.NoError(t, err)
		require.Equal(t, speaker.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr(), "the client that sends data is accepted first")
		require.Zero(t, testkit.KernelQueue(t, ln.Addr()))

		_, err = silent.Write([]byte("x"))
		require.NoError(t, err)
		require.Equal(t, silent.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr())
	})
}

// A client with a Fast Open cookie sends data in its SYN, and the listener accepts them.
func TestFastOpenActs(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 3)
		// inSYN connects and sends data, and reports whether the SYN carried them.
		inSYN := func(ln *acceptq.Listener) bool {
			const data = "in the SYN"
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			defer unix.Close(fd)
			to := &unix.SockaddrInet4{Port: ln.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
			require.NoError(t, unix.Sendto(fd, []byte(data), unix.MSG_FASTOPEN, to))

			c := testkit.AcceptBy(t, ln, ln.Accept)
			p := make([]byte, len(data))
			_, err = c.Read(p)
			require.NoError(t, err)
			require.Equal(t, data, string(p))
			const synData = 1 << 5 // TCPI_OPT_SYN_DATA, linux/tcp.h
			return testkit.TCPInfo(t, c).Options&synData != 0
		}

		ln, plain := listen(t, acceptq.WithFastOpen(5)), listen(t)
		require.False(t, inSYN(ln), "the first connection gets the cookie")
		require.Zero(t, testkit.KernelCounter(t, "TCPFastOpenPassive"))
		require.True(t, inSYN(ln), "the second one uses it")
		require.EqualValues(t, 1, testkit.KernelCounter(t, "TCPFastOpenPassive"))
		require.False(t, inSYN(plain), "without the option the data arrive after the handshake")
		require.EqualValues(t, 1, testkit.KernelCounter(t, "TCPFastOpenPassive"))
	})
}

// The buffer is set early enough to affect the window scale that the server announces.
func TestReceiveBufferScalesTheWindow(t *testing.T) {
	scale := func(opts ...acceptq.Option) int {
		ln := listen(t, opts...)
		client := testkit.Dial(t, ln.Addr())
		testkit.AcceptBy(t, ln, ln.Accept)
		return sendScale(t, client)
	}
	small, large, plain := scale(acceptq.WithReceiveBuffer(8192)), scale(acceptq.WithReceiveBuffer(bufferMax(t, "rmem_max"))), scale()
	t.Logf("window scale: %d with 8 KiB, %d with the largest, %d without", small, large, plain)
	require.Less(t, small, large)
	require.NotEqual(t, small, plain)
}

func TestBufferIsNotClamped(t *testing.T) {
	for _, b := range []struct {
		knob string
		with func(int) acceptq.Option
		name int
	}{
		{"rmem_max", acceptq.WithReceiveBuffer, unix.SO_RCVBUF},
		{"wmem_max", acceptq.WithSendBuffer, unix.SO_SNDBUF},
	} {
		most := bufferMax(t, b.knob)
		ln := listen(t, b.with(most))
		require.Equal(t, 2*most, testkit.Option(t, ln, testkit.SocketOption{Level: unix.SOL_SOCKET, Name: b.name}), b.knob)
		for _, n := range []int{most + 1, math.MaxInt32, math.MaxInt} {
			err := refusedWith(t, errors.ErrUnsupported, b.with(n))
			require.ErrorContains(t, err, "net.core."+b.knob)
		}
		// A small request is not clamped to less: the kernel has a minimum of its own.
		require.GreaterOrEqual(t, testkit.Option(t, listen(t, b.with(1)), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: b.name}), 2)
	}
}

// keepAliveValues are the keep-alive options of a socket.
type keepAliveValues struct{ on, idle, interval, count int }

func keepAliveOf(t *testing.T, c syscall.Conn) keepAliveValues {
	return keepAliveValues{
		testkit.Option(t, c, testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_KEEPALIVE}), testkit.Option(t, c, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_KEEPIDLE}),
		testkit.Option(t, c, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_KEEPINTVL}), testkit.Option(t, c, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_KEEPCNT}),
	}
}

// The fields have the same meaning as in net.ListenConfig, which the test compares
// with. The options are not set on the listening socket.
func TestKeepAliveMatchesNet(t *testing.T) {
	plain := listen(t)
	system := keepAliveOf(t, plain)
	require.Zero(t, system.on)
	require.Equal(t, keepAliveValues{1, 15, 15, 9}, keepAliveOf(t, acceptOne(t, plain, plain.Accept)))
	require.NotEqual(t, keepAliveValues{0, 15, 15, 9}, system)

	for _, row := range []struct {
		rule   string
		config net.KeepAliveConfig
		want   keepAliveValues
	}{
		{"all fields given", net.KeepAliveConfig{Enable: true, Idle: 33 * time.Second, Interval: 7 * time.Second, Count: 5}, keepAliveValues{1, 33, 7, 5}},
		{"zero means net's default", net.KeepAliveConfig{Enable: true}, keepAliveValues{1, 15, 15, 9}},
		{"negative means the system's value", net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}, keepAliveValues{1, system.idle, system.interval, system.count}},
		{"one negative", net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: -time.Second}, keepAliveValues{1, 60, system.interval, 9}},
		{"less than a second is rounded up to one", net.KeepAliveConfig{Enable: true, Idle: 1, Interval: time.Second + 1}, keepAliveValues{1, 1, 2, 9}},
		{"the kernel's largest", net.KeepAliveConfig{Enable: true, Idle: 32767 * time.Second, Interval: 32767 * time.Second, Count: 127}, keepAliveValues{1, 32767, 32767, 127}},
	} {
		t.Run(row.rule, func(t *testing.T) {
			lc := net.ListenConfig{KeepAliveConfig: row.config}
			lc.SetMultipathTCP(false)
			theirs, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer theirs.Close()
			require.Equal(t, row.want, keepAliveOf(t, acceptOne(t, theirs.(*net.TCPListener), theirs.Accept)), "net's own")

			ln := listen(t, acceptq.WithKeepAlive(row.config))
			require.Equal(t, system, keepAliveOf(t, ln))
			require.Equal(t, row.want, keepAliveOf(t, acceptOne(t, ln, ln.Accept)), "Accept")
			require.Equal(t, row.want, keepAliveOf(t, acceptOne(t, ln, func() (net.Conn, error) { return ln.AcceptTCP() })), "AcceptTCP")
		})
	}
	for _, off := range []net.KeepAliveConfig{{}, {Idle: time.Minute, Count: 1000}} {
		ln := listen(t, acceptq.WithKeepAlive(off))
		require.Equal(t, system, keepAliveOf(t, ln))
		none := keepAliveValues{0, 15, 15, 9} // the values of net, which are not in use
		require.Equal(t, none, keepAliveOf(t, acceptOne(t, ln, ln.Accept)))
		require.Equal(t, none, keepAliveOf(t, acceptOne(t, ln, func() (net.Conn, error) { return ln.AcceptTCP() })))
	}
}

// A value that would fail on every connection makes listening fail.
func TestKeepAliveFailsAtListen(t *testing.T) {
	for _, config := range []net.KeepAliveConfig{
		{Enable: true, Count: 1000},
		{Enable: true, Idle: 40_000 * time.Second},
		{Enable: true, Interval: 40_000 * time.Second},
	} {
		err := refusedWith(t, syscall.EINVAL, acceptq.WithKeepAlive(config))
		require.ErrorContains(t, err, "WithKeepAlive")
	}
}

// The WithControl function is called once, with the same arguments as the one of net, for a
// socket that has its options but no address yet.
func TestControlMatchesNet(t *testing.T) {
	type call struct{ network, address string }
	for _, where := range []call{{network: "tcp", address: "127.0.0.1:0"}, {network: "tcp4", address: ":0"}, {network: "tcp", address: ":0"}, {network: "tcp", address: "0.0.0.0:0"}, {network: "tcp", address: "localhost:0"}, {network: "tcp6", address: "[::1]:0"}, {network: "tcp", address: "[::]:0"}} {
		t.Run(where.network+" "+where.address, func(t *testing.T) {
			var theirs, ours []call
			lc := net.ListenConfig{Control: func(network, address string, _ syscall.RawConn) error {
				theirs = append(theirs, call{network: network, address: address})
				return nil
			}}
			lc.SetMultipathTCP(false)
			l, err := lc.Listen(t.Context(), where.network, where.address)
			if err != nil {
				t.Skipf("net cannot listen there either: %v", err)
			}
			l.Close()

			var kept syscall.RawConn
			ln, err := acceptq.Listen(t.Context(), where.network, where.address, acceptq.WithReceiveBuffer(50_000), acceptq.WithControl(
				func(network, address string, c syscall.RawConn) error {
					ours = append(ours, call{network: network, address: address})
					kept = c
					size, err := endpoint.RawInt(c, func(fd int) (int, error) { return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF) })
					require.NoError(t, err)
					require.Equal(t, 100_000, size)
					require.NoError(t, c.Control(func(fd uintptr) {
						sa, err := unix.Getsockname(int(fd))
						require.NoError(t, err)
						switch sa := sa.(type) {
						case *unix.SockaddrInet4:
							require.Zero(t, sa.Port)
						case *unix.SockaddrInet6:
							require.Zero(t, sa.Port)
						}
					}))
					return nil
				}))
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, theirs, ours)
			require.Error(t, kept.Control(func(uintptr) {}), "c is valid only during the call")
		})
	}
}

// refusedWith listens with opts, requires an error that matches target, and returns it.
func refusedWith(t *testing.T, target error, opts ...acceptq.Option) error {
	t.Helper()
	before := testkit.OpenDescriptors()
	ln, err := acceptq.ListenTCP("127.0.0.1:0", opts...)
	require.ErrorIs(t, err, target)
	require.Nil(t, ln)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	require.Equal(t, before, testkit.OpenDescriptors())
	return err
}

// acceptOne accepts a client that sends data at once.
func acceptOne(t *testing.T, ln interface {
	Addr() net.Addr
	SetDeadline(time.Time) error
}, method func() (net.Conn, error)) *net.TCPConn {
	t.Helper()
	_, err := testkit.Dial(t, ln.Addr()).Write([]byte("x"))
	require.NoError(t, err)
	return testkit.AcceptBy(t, ln, method)
}

// sendScale returns the window scale that the peer of c has announced: tcpi_snd_wscale, the
// first of two bit fields in a byte that x/sys omits.
func sendScale(t *testing.T, c syscall.Conn) (scale int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		p := make([]byte, 8)
		_, err = sys.Getsockopt(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO, p)
		if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
			scale = int(p[6] & 15)
		} else {
			scale = int(p[6] >> 4)
		}
	}))
	require.NoError(t, err)
	return scale
}

// bufferMax reads the largest buffer that this machine grants.
func bufferMax(t *testing.T, knob string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/core/" + knob)
	require.NoError(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(t, err)
	return min(n, math.MaxInt32/2)
}

// The recipe for MD5 keeps out a client that does not sign its segments.
func TestControlMD5(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		sig := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}}
		copy(sig.Addr.Data[2:], []byte{127, 0, 0, 1})
		sig.Keylen = uint16(copy(sig.Key[:], "secret"))
		md5 := func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig) })
			return errors.Join(cerr, err)
		}
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(md5))
		if errors.Is(err, unix.ENOPROTOOPT) {
			t.Skip("this kernel is built without CONFIG_TCP_MD5SIG")
		}
		require.NoError(t, err)
		defer ln.Close()

		require.Zero(t, testkit.KernelCounter(t, "TCPMD5NotFound"))
		ctx, cancel := context.WithCancel(t.Context())
		unsigned := make(chan error)
		go func() {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
			if err == nil {
				c.Close()
			}
			unsigned <- err
		}()
		ignored := func() bool { return testkit.KernelCounter(t, "TCPMD5NotFound") > 0 }
		seen := testkit.Eventually(ignored)
		cancel()
		require.Error(t, <-unsigned)
		require.True(t, seen, "the kernel should ignore the unsigned SYN")

		address := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
		signed := net.Dialer{LocalAddr: address, Timeout: 10 * time.Second, Control: md5}
		c, err := signed.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		require.Equal(t, c.LocalAddr(), testkit.AcceptBy(t, ln, ln.Accept).RemoteAddr())
	})
}

// Connections inherit the options of the recipes, as the examples say.
func TestControlIsInherited(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		plain := listen(t)
		plainConn := acceptOne(t, plain, plain.Accept)
		for _, o := range []struct {
			name          string
			level, opt, v int
		}{
			{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 42},
			{"IP_TOS", unix.IPPROTO_IP, unix.IP_TOS, 46 << 2},
			{"IP_TTL", unix.IPPROTO_IP, unix.IP_TTL, 33},
			{"IP_TRANSPARENT", unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1},
			{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30_000},
		} {
			ln := listen(t, acceptq.WithControl(func(_, _ string, c syscall.RawConn) (err error) {
				cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), o.level, o.opt, o.v) })
				return errors.Join(cerr, err)
			}))
			c := acceptOne(t, ln, ln.Accept)
			require.NotEqual(t, o.v, testkit.Option(t, plain, testkit.SocketOption{Level: o.level, Name: o.opt}), o.name)
			require.NotEqual(t, o.v, testkit.Option(t, plainConn, testkit.SocketOption{Level: o.level, Name: o.opt}), o.name)
			require.Equal(t, o.v, testkit.Option(t, ln, testkit.SocketOption{Level: o.level, Name: o.opt}), o.name)
			require.Equal(t, o.v, testkit.Option(t, c, testkit.SocketOption{Level: o.level, Name: o.opt}), o.name)
		}

		// docs/migrating.md says that connections do not inherit this option.
		ln := listen(t, acceptq.WithControl(func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, 5) })
			return errors.Join(cerr, err)
		}))
		c := acceptOne(t, ln, ln.Accept)
		require.Equal(t, 5, testkit.Option(t, ln, testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_PRIORITY}))
		require.Zero(t, testkit.Option(t, c, testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_PRIORITY}))
	})
}

// A thread in another network namespace listens in that namespace, as docs/migrating.md
// says for the parameter namespace of HAProxy.
func TestListenInTheThreadsNamespace(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		type result struct {
			ln  *acceptq.Listener
			err error
		}
		made := make(chan result)
		go func() {
			runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				made <- result{ln: nil, err: err}
				return
			}
			ln, err := acceptq.ListenTCP(":0")
			made <- result{ln: ln, err: err}
		}()
		r := <-made
		require.NoError(t, r.err)
		defer r.ln.Close()
		_, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(r.ln.Addr().(*net.TCPAddr).Port)))
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	})
}
