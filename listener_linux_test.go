package acceptq

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// unreadable has kernels whose sockets do not report their limit.
var unreadable = map[string]func(k *sys.Calls){
	"EPERM":         answers(0, unix.EPERM),
	"ENOPROTOOPT":   answers(0, unix.ENOPROTOOPT),
	"EOPNOTSUPP":    answers(0, unix.EOPNOTSUPP),
	"nothing":       answers(0, nil),
	"a short one":   answers(tcpinfo.QueueEnd-1, nil, tcpinfo.Listen),
	"gVisor's":      answers(tcpinfo.QueueEnd, nil), // all zeros
	"another state": answers(tcpinfo.QueueEnd, nil, append([]byte{1}, bytes.Repeat([]byte{9}, tcpinfo.QueueEnd-1)...)...),
}

// answers returns a function that answers TCP_INFO with n bytes that begin with info.
func answers(n int, err error, info ...byte) func(k *sys.Calls) {
	return func(k *sys.Calls) {
		k.Getsockopt = func(_, _, _ int, p []byte) (int, error) {
			copy(p, info)
			return n, err
		}
	}
}

// If a socket does not report its limit, the library computes it by the rule and sets
// Measured to false. Listening succeeds.
func TestUnreadableLimitFollowsTheRule(t *testing.T) {
	for name, breaks := range unreadable {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			breaks(&k)
			ceilingFile("5\n", nil)(&k)
			for n, limit := range map[int]int{-1: 5, 0: 0, 2: 2, 5: 5, 6: 5} {
				ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n)})
				require.NoError(t, err)
				require.NoError(t, ln.Close())
				require.Equal(t, Backlog{
					Requested: n, Ceiling: 5, Limit: limit, Effective: limit, Capacity: limit + 1,
				}, ln.Backlog(), "asked %d", n)
			}
		})
	}
}

func TestUnreadableCeilingIsUnknown(t *testing.T) {
	for name, breaks := range hidden {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			breaks(&k)
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			require.NoError(t, err, "the limit comes from the socket")
			defer ln.Close()
			require.Equal(t, Backlog{
				Requested: 1, Ceiling: -1, Limit: 1, Effective: 1, Capacity: 2, Measured: true,
			}, ln.Backlog())

			b, err := predict(&k, 1)
			require.Error(t, err)
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, b)
		})
	}
}

func TestNothingCanBeRead(t *testing.T) {
	for name, breaks := range hidden {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			unreadable["gVisor's"](&k)
			breaks(&k)
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, ln.Backlog())
			require.Equal(t, -1, ln.EffectiveBacklog())

			var bound string
			k.Bind = noteBound(t, &bound)
			err = testkit.Refused(t, func() (*Listener, error) {
				return listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			})
			require.ErrorIs(t, err, errors.ErrUnsupported, "WithStrictBacklog needs the limit")
			testkit.FreeAgain(t, "tcp", bound)
		})
	}
}

// optional reports whether listening succeeds without the option.
func optional(level, name int) bool {
	switch [2]int{level, name} {
	case [2]int{unix.SOL_SOCKET, unix.SO_PROTOCOL}, [2]int{unix.SOL_SOCKET, unix.SO_RXQ_OVFL}, [2]int{unix.IPPROTO_IP, unix.IP_MINTTL}, [2]int{unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT},
		[2]int{unix.SOL_SOCKET, unix.SO_REUSEPORT}, [2]int{unix.IPPROTO_IP, unix.IP_TRANSPARENT}, [2]int{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT}:
		return true
	}
	return false
}

// statsCalls are the calls that Stats cannot do without: none.
var statsCalls []string

func kernelOptions() []Option {
	return []Option{
		WithDeferAccept(10 * time.Second), WithFastOpen(9), WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: -1}),
	}
}

// willing returns a kernel whose setting allows TCP Fast Open for servers.
func willing() sys.Calls {
	k := sys.Real
	k.ReadFile = func(name string) ([]byte, error) {
		if strings.HasSuffix(name, "/tcp_fastopen") {
			return []byte("3\n"), nil
		}
		return sys.Real.ReadFile(name)
	}
	return k
}

func kernelAnswers(all map[string][]answer) {
	all["getsockopt, of bytes"] = all["getsockopt"][:len(all["getsockopt"])-5]
	for _, n := range []int{0, tcpinfo.QueueEnd - 1, tcpinfo.QueueEnd, math.MaxInt32, -1} {
		for _, b := range []byte{0, tcpinfo.Listen, 0xff} {
			all["getsockopt, of bytes"] = append(all["getsockopt, of bytes"], answer{n: n, text: bytes.Repeat([]byte{b}, 64)})
		}
	}
	all["setsockopt of a filter"] = refusals(unix.EBADF, unix.EFAULT, unix.EINVAL, unix.ENOMEM, unix.EPERM, unix.EOPNOTSUPP,
		unix.ENOPROTOOPT, unix.ENOTSOCK)
	// EINVAL and a length above 0 mean that the user has set a filter. The library trusts
	// this: removing the user's filter would be worse than leaving its own.
	all["getsockopt of a filter"] = append(refusals(unix.EBADF, unix.EFAULT, unix.ENOBUFS, unix.ENOMEM, unix.ENOPROTOOPT, unix.ENOTSOCK,
		unix.EPERM, unix.EOPNOTSUPP), numbers(0)...)
	all["getsockopt, of a proxy"] = refusals(unix.EBADF, unix.EFAULT, unix.ENOBUFS, unix.ENOMEM, unix.ENOTSOCK, unix.EPERM)
	all["setsockopt of a program"] = refusals(unix.EBADF, unix.EFAULT, unix.EINVAL, unix.ENOMEM, unix.EPERM, unix.EOPNOTSUPP, unix.ENOPROTOOPT)
	all["socket of a probe"] = refusals(unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EMFILE, unix.ENFILE, unix.ENOMEM)
	all["client of a question"] = refusals(unix.EACCES, unix.EPERM, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EADDRINUSE, unix.EADDRNOTAVAIL)
	all["connect"] = refusals(unix.EACCES, unix.EPERM, unix.EADDRNOTAVAIL, unix.EAGAIN, unix.ENETUNREACH, unix.ECONNREFUSED, unix.ENOSYS)
	all["bind of a name"] = refusals(unix.EACCES, unix.EPERM, unix.EADDRINUSE, unix.EINVAL, unix.ENOMEM)
	all["ioctl"] = refusals(unix.EPERM, unix.ENOTTY, unix.EINVAL, unix.EMFILE)
	all["descriptors"] = append(refusals(unix.ENOENT, unix.EACCES, unix.EMFILE), numbers(0)...)
	all["sock_diag"] = refusals(unix.EACCES, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM,
		unix.EAGAIN, unix.EBADMSG, unix.ECONNREFUSED, unix.ENOENT, unix.EPERM, unix.EOPNOTSUPP)
	for _, rows := range [][][]byte{nil, {nil}, {{1}}, {make([]byte, sockdiag.DiagMsgSize-1)}, {make([]byte, sockdiag.DiagMsgSize)},
		{bytes.Repeat([]byte{0xff}, sockdiag.DiagMsgSize+9), make([]byte, sockdiag.DiagMsgSize)}} {
		all["sock_diag"] = append(all["sock_diag"], answer{rows: rows})
	}
	all["read"] = refusals(unix.EACCES, unix.EPERM, unix.ENOENT, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EISDIR, unix.EAGAIN)
	for _, text := range []string{"", "\n", "\x00", "0", "-1\n", "1 2\n", "99999999999999999999\n", "TcpExt:", "TcpExt: ListenDrops\nTcpExt: -\n",
		strings.Repeat("9", 1<<16), strings.Repeat("TcpExt:\n", 1<<10)} {
		all["read"] = append(all["read"], answer{text: []byte(text)})
	}
}

func (m *meddler) ownCalls(k *sys.Calls, base sys.Calls, meddle func() answer) {
	k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
		if m.turn("getsockopt, of bytes") {
			copy(p, meddle().text)
			return meddle().n, meddle().err
		}
		return base.Getsockopt(fd, level, name, p)
	}
	others := k.GetsockoptInt
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		if level == unix.IPPROTO_IP && name == unix.IP_TRANSPARENT || level == unix.IPPROTO_IPV6 && name == unix.IPV6_TRANSPARENT {
			if m.turn("getsockopt, of a proxy") {
				return meddle().n, meddle().err
			}
			return base.GetsockoptInt(fd, level, name)
		}
		return others(fd, level, name)
	}
	k.AttachFilter = func(fd int, prog *unix.SockFprog) error {
		if m.turn("setsockopt of a filter") {
			return meddle().err
		}
		return base.AttachFilter(fd, prog)
	}
	k.GetFilter = func(fd int, p []unix.SockFilter) (int, error) {
		if m.turn("getsockopt of a filter") {
			return meddle().n, meddle().err
		}
		return base.GetFilter(fd, p)
	}
	k.AttachProgram = func(fd int, p []unix.SockFilter) error {
		if m.turn("setsockopt of a program") {
			return meddle().err
		}
		return base.AttachProgram(fd, p)
	}
	k.DetachProgram = func(fd int) error {
		if m.turn("setsockopt of a program") {
			return meddle().err
		}
		return base.DetachProgram(fd)
	}
	k.UnixSocket = func() (int, error) {
		if m.turn("socket of a probe") {
			return -1, meddle().err
		}
		return base.UnixSocket()
	}
	k.ClientSocket = func(at unix.Sockaddr, ttl int, deaf bool) (int, uint16, error) {
		if m.turn("client of a question") {
			return -1, 0, meddle().err
		}
		return base.ClientSocket(at, ttl, deaf)
	}
	k.Connect = func(fd int, to unix.Sockaddr) error {
		if m.turn("connect") {
			return meddle().err
		}
		return base.Connect(fd, to)
	}
	k.Disconnect = func(fd int, at unix.Sockaddr) error {
		if m.turn("connect") {
			return meddle().err
		}
		return base.Disconnect(fd, at)
	}
	k.Reserve = func(fd int, name string) error {
		if m.turn("bind of a name") {
			return meddle().err
		}
		return base.Reserve(fd, name)
	}
	k.NamespaceFile = func(fd int) (*os.File, error) {
		if m.turn("ioctl") {
			return nil, meddle().err
		}
		return base.NamespaceFile(fd)
	}
	k.Descriptors = func() (map[uint64]int, error) {
		if m.turn("descriptors") {
			return nil, meddle().err
		}
		return base.Descriptors()
	}
	k.Diag = func(request []byte) (sys.DiagAnswer, error) {
		if m.turn("sock_diag") {
			if err := meddle().err; err != nil {
				return sys.DiagAnswer{}, err
			}
			return testkit.Listing(meddle().rows...)(request)
		}
		return base.Diag(request)
	}
	k.ReadFile = func(name string) ([]byte, error) {
		if m.turn("read") {
			return meddle().text, meddle().err
		}
		return base.ReadFile(name)
	}
}

// kernelActs are drains with the filter and with the minimum TTL, of a socket with and
// without another holder.
func kernelActs() (acts []act) {
	stops := map[string]sys.Calls{"filter": sys.Real, "minimum TTL": withoutFilter()}
	for _, name := range slices.Sorted(maps.Keys(stops)) {
		if name == "filter" && !mayFilter() {
			continue
		}
		for _, host := range []string{"127.0.0.1", "::1"} {
			if testkit.AFreeAddress("tcp", host) == "" {
				continue
			}
			base := stops[name]
			// The real answer takes the kernel a millisecond, and all other tests use it.
			base.Diag = testkit.Listing()
			acts = append(acts, drainedAlone(name, host, base), drainedShared(name, host, base))
		}
	}
	return append(acts, acceptedStopped(), queueTimed(), waitingListed())
}

// queueTimed calls QueueTime of an accepted connection.
func queueTimed() act {
	return act{
		name: "QueueTime", op: "queuetime", base: sys.Real, fatal: []string{"getsockopt, of bytes"},
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			h := holdQueue(t, k, 1)
			require.NoError(t, h.ln.SetDeadline(time.Now().Add(testkit.Patience)))
			s, err := h.ln.Accept()
			require.NoError(t, err)
			do := func() error {
				d, err := queueTimeOf(k, s)
				if (err == nil) != (d >= 0) {
					return fmt.Errorf("%v and %w", d, err)
				}
				return err
			}
			return do, func(error) error {
				_, err := s.Write([]byte("ok"))
				return errors.Join(err, s.Close(), h.clients[0].Close(), h.ln.Close())
			}
		},
	}
}

// waitingListed calls Waiting. The clients stay in the queue.
func waitingListed() act {
	return on("Waiting", "waiting", []string{"getsockopt", "getsockopt, of a proxy", "sock_diag"}, func(t *testing.T, _ *sys.Calls, ln *Listener) error {
		all, err := ln.Waiting(t.Context())
		if err != nil && all != nil {
			return fmt.Errorf("%v and %w", all, err)
		}
		return err
	})
}

// mayFilter reports whether this process may set a filter.
func mayFilter() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return sys.Real.AttachFilter(fd, &unix.SockFprog{Len: uint16(len(intake.DropSYN)), Filter: &intake.DropSYN[0]}) == nil
}

// drainBriefly drains with a timeout that is long enough for two looks.
func drainBriefly(ln *Listener) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	return ln.Drain(ctx)
}

// drainedAlone drains an empty queue.
func drainedAlone(stop, host string, base sys.Calls) act {
	return act{
		name: "Drain by " + stop + " on " + host, op: "drain", base: base,
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			ln, err := listenWith(k, t.Context(), "tcp", net.JoinHostPort(host, "0"), nil)
			require.NoError(t, err)
			return func() error { return drainBriefly(ln) }, func(error) error {
				return errors.Join(ln.Close(), testkit.FreeNow(ln.Addr().String()))
			}
		},
	}
}

// drainedShared drains a queue with clients, on a shared socket. At the end the stop is
// lifted, so that clients can reach the other holder.
func drainedShared(stop, host string, base sys.Calls) act {
	return act{
		name: "Drain by " + stop + " of a shared queue on " + host, op: "drain", base: base,
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			ln, err := listenWith(k, t.Context(), "tcp", net.JoinHostPort(host, "0"), []Option{WithBacklog(8)})
			require.NoError(t, err)
			h := &queueHolder{ln: ln}
			join := func() error {
				c, err := net.DialTimeout("tcp", ln.Addr().String(), 3*time.Second)
				if err == nil {
					h.clients = append(h.clients, c)
				}
				return err
			}
			require.NoError(t, join())
			ln.intake.MarkShared()
			return func() error { return drainBriefly(ln) }, func(err error) error {
				if op := new(net.OpError); errors.As(err, &op) {
					ln.intake.MarkShared() // a stop that could not be lifted is lifted at the next call
				}
				return errors.Join(join(), h.close())
			}
		},
	}
}

// acceptedStopped accepts a connection that inherited a minimum TTL.
func acceptedStopped() act {
	return act{
		name: "Accept of what inherited a stop", op: "accept", base: withoutFilter(),
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			h := holdQueue(t, k, 0)
			require.NoError(t, h.ln.Drain(testkit.Within(t, testkit.Patience)))
			d := net.Dialer{Timeout: testkit.Patience, Control: control255}
			c, err := d.Dial("tcp", h.ln.Addr().String())
			require.NoError(t, err)
			c.SetDeadline(time.Now().Add(testkit.Patience))
			do := func() error { return takesOne(h.ln) }
			return do, func(error) error {
				_, err := io.ReadFull(c, make([]byte, 2))
				return errors.Join(err, c.Close(), h.close())
			}
		},
	}
}

// control255 makes a client send with a TTL of 255, which the minimum TTL lets pass.
func control255(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, intake.MaxTTL) })
	return errors.Join(cerr, err)
}

// A crowd is a number of clients that connect repeatedly until they are told to stop.
type crowd struct {
	stop         chan struct{}
	wait         sync.WaitGroup
	ok, lost     atomic.Int64
	mu           sync.Mutex
	firstFailure error
}

// newCrowd starts n clients, spread over the addresses.
func newCrowd(n int, addrs ...string) *crowd {
	c := &crowd{stop: make(chan struct{})}
	for i := range n {
		c.wait.Go(func() { c.run(i, addrs[i%len(addrs)]) })
	}
	return c
}

// end tells the clients to stop and waits until each has finished its request.
func (c *crowd) end() {
	close(c.stop)
	c.wait.Wait()
}

func (c *crowd) run(id int, addr string) {
	// The kernel retransmits a dropped SYN after a second. These clients try again at
	// once, so that there are always clients that want to connect.
	d := net.Dialer{Timeout: 100 * time.Millisecond, Control: testkit.LateACK}
	for i := id; ; i++ {
		select {
		case <-c.stop:
			return
		default:
		}
		conn, err := d.Dial("tcp", addr)
		if err != nil { // refused between two servers, or dropped during a drain: not a loss
			<-time.After(time.Millisecond)
			continue
		}
		<-time.After(time.Duration(i%4*10) * time.Millisecond) // the duration of this handshake
		if err := request(conn); err != nil {
			c.lost.Add(1)
			c.mu.Lock()
			if c.firstFailure == nil {
				c.firstFailure = err
			}
			c.mu.Unlock()
		} else {
			c.ok.Add(1)
		}
	}
}

// request sends one request on conn, together with a delayed ACK, and reads the whole
// answer.
func request(conn net.Conn) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && string(body) != "served" {
		err = fmt.Errorf("answer %q", body)
	}
	return err
}

// way describes how a socket keeps clients out: the length of its filter, and the values
// of IP_MINTTL and IPV6_MINHOPCOUNT (-1 if the socket has no such option).
type way struct{ filter, ttl, hops int }

// after returns the way of a drain on a socket whose user demands a minimum TTL.
func (w way) after(minimum int) way {
	switch {
	case minimum == 0:
	case w.ttl == 0:
		w.ttl = minimum
	default:
		w.ttl -= minimum
	}
	return w
}

func wayOf(t *testing.T, raw syscall.RawConn) (w way) {
	t.Helper()
	cerr := raw.Control(func(fd uintptr) {
		var err error
		if w.filter, err = sys.Getsockopt(int(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER, nil); err != nil {
			w.filter = -1
		}
		if w.ttl, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL); err != nil {
			w.ttl = -1
		}
		if w.hops, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT); err != nil {
			w.hops = -1
		}
	})
	require.NoError(t, cerr)
	return w
}

// haveIPv6 skips a test if the kernel has no IPv6.
func haveIPv6(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	ln.Close()
}

// stops are the two ways in which a drain keeps new clients out. In its own namespace a
// test may use the filter. If the filter is refused, Drain uses the minimum TTL.
var stops = []struct {
	name   string
	kernel func() sys.Calls
	v4     way // on a socket without options of the user
}{
	{"filter", func() sys.Calls { return sys.Real }, way{len(intake.DropSYN), 0, -1}},
	{"minimum TTL", withoutFilter, way{0, intake.MaxTTL, -1}},
}

func withoutFilter() sys.Calls {
	k := sys.Real
	k.AttachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
	return k
}

// forEachStop runs f in a namespace, once with each of stops.
func forEachStop(t *testing.T, f func(t *testing.T, k sys.Calls, v4 way)) {
	t.Helper()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, stop := range stops {
			t.Run(stop.name, func(t *testing.T) { f(t, stop.kernel(), stop.v4) })
		}
	})
}

func listen4(t *testing.T, k sys.Calls, opts ...Option) *Listener {
	t.Helper()
	ln, err := listenWith(&k, t.Context(), "tcp4", "127.0.0.1:0", opts)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// withInt sets a socket option before bind.
func withInt(level, name, value int) Option {
	return WithControl(func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) })
		return errors.Join(cerr, err)
	})
}

// A deafClient receives nothing from its server: a minimum TTL on its own socket drops the
// answers. Its handshake stays in flight until hear is called. Then it takes up to a
// second, until the server retransmits its SYN-ACK.
type deafClient struct {
	raw  syscall.RawConn
	conn chan net.Conn // receives nil if the client failed
}

func newDeafClient(t *testing.T, addr net.Addr) *deafClient {
	t.Helper()
	c := &deafClient{conn: make(chan net.Conn, 1)}
	before := testkit.SynReceived(t, addr)
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	raw := make(chan syscall.RawConn, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		d := net.Dialer{Control: func(_, _ string, r syscall.RawConn) error {
			raw <- r
			return testkit.SetMinTTL(r, intake.MaxTTL)
		}}
		conn, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil && ctx.Err() == nil {
			t.Errorf("a client of %v: %v", addr, err)
		}
		c.conn <- conn
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		select {
		case conn := <-c.conn:
			if conn != nil {
				conn.Close()
			}
		default:
		}
	})
	c.raw = <-raw
	require.Eventually(t, func() bool { return testkit.SynReceived(t, addr) == before+1 }, testkit.Patience, time.Millisecond)
	return c
}

func (c *deafClient) hear(t *testing.T) { require.NoError(t, testkit.SetMinTTL(c.raw, 0)) }

// connected returns the connection of a client for which hear was called.
func (c *deafClient) connected(t *testing.T) net.Conn {
	t.Helper()
	select {
	case conn := <-c.conn:
		require.NotNil(t, conn)
		t.Cleanup(func() { conn.Close() })
		return conn
	case <-time.After(testkit.Patience):
		t.Fatal("the handshake was not finished")
		return nil
	}
}

// untilStopped waits until the drain keeps new clients out.
func untilStopped(t *testing.T, ln *Listener, want way) {
	t.Helper()
	require.Eventually(t, func() bool { return wayOf(t, ln.intake.Raw) == want }, testkit.Patience, time.Millisecond)
}

// requireStillOpen requires that a drain has waited for every client and lets new clients
// in.
func requireStillOpen(t *testing.T, err error) {
	t.Helper()
	require.ErrorIs(t, err, ErrStillOpen)
	testkit.RequireDrainOp(t, err)
	require.NotNil(t, err.(*net.OpError).Addr)
}

// duplicate is a second listener over the socket of raw.
func duplicate(t *testing.T, raw syscall.RawConn) net.Listener {
	t.Helper()
	var f *os.File
	require.NoError(t, raw.Control(func(fd uintptr) {
		if dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			f = os.NewFile(uintptr(dup), "listener")
		}
	}))
	defer f.Close()
	other, err := net.FileListener(f)
	require.NoError(t, err)
	return other
}

// hidden has kernels whose ceiling cannot be read.
var hidden = map[string]func(k *sys.Calls){
	"ENOENT":          ceilingFile("", os.ErrNotExist),
	"EACCES":          ceilingFile("", os.ErrPermission),
	"EIO":             ceilingFile("", unix.EIO),
	"empty":           ceilingFile("", nil),
	"a newline":       ceilingFile("\n", nil),
	"words":           ceilingFile("lots\n", nil),
	"two numbers":     ceilingFile("128 4096\n", nil),
	"negative":        ceilingFile("-1\n", nil),
	"33 bits":         ceilingFile("4294967296\n", nil),
	"a NUL behind it": ceilingFile("128\x00", nil),
}

func ceilingFile(text string, err error) func(k *sys.Calls) {
	return func(k *sys.Calls) {
		k.ReadFile = func(string) ([]byte, error) { return []byte(text), err }
	}
}

// A program listens in another network namespace and calls the Listener from any
// thread. The numbers must be those of the namespace of the socket.
func TestListenerInAnotherNamespace(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 100)
		for _, row := range []struct {
			name    string
			kernel  func() sys.Calls
			entered bool
		}{
			{"a namespace that can be entered", func() sys.Calls { return sys.Real }, true},
			{"a namespace without a name", func() sys.Calls {
				k := sys.Real
				k.NamespaceFile = func(int) (*os.File, error) { return nil, unix.EPERM }
				return k
			}, false},
			{"a file that is not a namespace", func() sys.Calls {
				k := sys.Real
				k.NamespaceFile = func(int) (*os.File, error) { return os.Open("/dev/null") }
				return k
			}, false},
		} {
			t.Run(row.name, func(t *testing.T) {
				other := testkit.NewVisited(t)
				var ln *Listener
				other.In(func() {
					require.NoError(t, os.WriteFile("/proc/sys/net/core/somaxconn", []byte("3000"), 0))
					k := row.kernel()
					var err error
					ln, err = listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(200), WithStrictBacklog()})
					require.NoError(t, err)
				})
				defer ln.Close()

				if row.entered {
					require.Equal(t, 3000, ln.Backlog().Ceiling)
				} else {
					require.Equal(t, unknown, ln.Backlog().Ceiling)
				}
				b, err := ln.SetBacklog(2000)
				if row.entered {
					require.NoError(t, err, "the ceiling of 100 belongs to another namespace")
					require.Equal(t, 2000, b.Limit)
					_, err = ln.SetBacklog(5000)
					var clamp *ClampError
					require.ErrorAs(t, err, &clamp)
					require.Equal(t, 3000, clamp.Limit)
					require.Equal(t, 2000, ln.Backlog().Limit, "the limit must not change")
				} else {
					require.ErrorIs(t, err, errors.ErrUnsupported, "what the kernel would grant cannot be predicted")
					require.Equal(t, 200, b.Limit, "the limit must not change")
				}

				// A handshake is in flight there for longer than a drain waits that
				// cannot read it.
				var fd int
				other.In(func() { fd = deafSocket(t, ln.Addr()) })
				drained := testkit.InBackground(t, ln, testkit.Within(t, testkit.Patience))
				untilStopped(t, ln, way{len(intake.DropSYN), 0, -1})
				require.ErrorAs(t, ln.Drain(testkit.Within(t, 100*time.Millisecond)), new(*DrainError))
				c := hearing(t, fd)
				s, err := ln.Accept()
				require.NoError(t, err)
				defer s.Close()
				testkit.Talk(t, c, s)
				require.NoError(t, ln.SetDeadline(time.Now()))
				_, err = ln.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.NoError(t, testkit.Received(t, drained))
			})
		}
	})
}

// deafSocket starts a handshake in the namespace of the calling thread and drops the
// answer.
func deafSocket(t *testing.T, addr net.Addr) (fd int) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, intake.MaxTTL))
	sa := &unix.SockaddrInet4{Port: addr.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	require.ErrorIs(t, unix.Connect(fd, sa), unix.EINPROGRESS)
	for deadline := time.Now().Add(testkit.Patience); testkit.SynReceived(t, addr) != 1; runtime.Gosched() { // on this thread
		require.True(t, time.Now().Before(deadline))
	}
	return fd
}

// hearing lets a deafSocket receive, and waits until it is connected.
func hearing(t *testing.T, fd int) net.Conn {
	t.Helper()
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, 0))
	require.Eventually(t, func() bool {
		_, err := unix.Getpeername(fd)
		return err == nil
	}, testkit.Patience, time.Millisecond)
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	c, err := net.FileConn(f)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// If the kernel would accept the option without effect, or clamp its value, listening
// fails.
func TestFastOpenWithoutEffectIsAnError(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		const knob = "net.ipv4.tcp_fastopen"
		for _, bits := range []int{0, 1, 1 | 0x200 | 0x400} {
			testkit.SetSysctl(t, knob, bits)
			err := refusedWith(t, errors.ErrUnsupported, WithFastOpen(1))
			require.ErrorContains(t, err, knob+"="+strconv.Itoa(bits|2), "the error says which setting helps")
		}
		for name, readFile := range map[string]func(string) ([]byte, error){
			"unreadable": func(string) ([]byte, error) { return nil, fs.ErrPermission },
			"no number":  func(string) ([]byte, error) { return []byte("on\n"), nil },
		} {
			k := sys.Real
			k.ReadFile = readFile
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithFastOpen(3)})
			require.NoError(t, err, name)
			require.Equal(t, 3, testkit.Option(t, ln, testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_FASTOPEN}), name)
			ln.Close()
		}

		testkit.SetSysctl(t, knob, 3)
		testkit.SetSysctl(t, "net.core.somaxconn", 4)
		require.Equal(t, 4, testkit.Option(t, listen(t, WithFastOpen(4)), testkit.SocketOption{Level: unix.IPPROTO_TCP, Name: unix.TCP_FASTOPEN}))
		for _, qlen := range []int{5, math.MaxInt32, math.MaxInt} {
			err := refusedWith(t, errors.ErrUnsupported, WithFastOpen(qlen))
			require.ErrorContains(t, err, "net.core.somaxconn")
		}
	})
}

// refusedWith listens with opts, requires an error that matches target, and returns it.
func refusedWith(t *testing.T, target error, opts ...Option) error {
	t.Helper()
	before := testkit.OpenDescriptors()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	require.ErrorIs(t, err, target)
	require.Nil(t, ln)
	var op *net.OpError
	require.ErrorAs(t, err, &op)
	require.Equal(t, "listen", op.Op)
	require.Equal(t, before, testkit.OpenDescriptors())
	return err
}

func inode(t *testing.T, l *Listener) uint64 {
	t.Helper()
	var stat unix.Stat_t
	var operr error
	require.NoError(t, l.intake.Raw.Control(func(fd uintptr) { operr = unix.Fstat(int(fd), &stat) }))
	require.NoError(t, operr)
	return stat.Ino
}

// agrees requires that the numbers of each shard and their sums match those of the kernel.
func agrees(t *testing.T, s *Shards) (sum Stats) {
	t.Helper()
	kernel := testkit.KernelQueues(t)
	var want Stats
	for l := range s.All() {
		q, err := l.Stats()
		require.NoError(t, err)
		queued, listens := kernel[inode(t, l)]
		require.True(t, listens)
		require.Equal(t, queued, q.Queued)
		want.Queued += queued
		want.Limit += q.Limit
		want.Capacity += q.Capacity
		want.Drops += q.Drops
		if s.Len() > 1 && (want.Fullest == nil || q.Queued > want.Fullest.Queued) {
			want.Fullest = &q
		}
	}
	sum, err := s.Stats()
	require.NoError(t, err)
	want.Incomplete = unknown
	require.Equal(t, want, sum)
	return sum
}

// With a fixed ceiling a stalled server keeps 129 of 1200 clients with one listener,
// and all of them with 16 shards.
func TestMoreQueueThanTheCeiling(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 128)

		one, err := ListenTCPShards("127.0.0.1:0", 1)
		require.NoError(t, err)
		defer one.Close()
		require.Len(t, testkit.ConnectUntilFull(t, one.Addr(), 200), 129)
		full := agrees(t, one)
		require.Equal(t, 129, full.Queued)
		require.Positive(t, full.Drops)

		const n, clients = 16, 1200
		s, err := ListenTCPShards("127.0.0.1:0", n)
		require.NoError(t, err)
		defer s.Close()
		require.Equal(t, n*128, s.EffectiveBacklog())
		overflows := testkit.KernelCounter(t, "ListenOverflows")
		conns := testkit.ConnectAll(t, s.Addr(), clients)
		queuedBecomes(t, clients, s.Stats)
		held := agrees(t, s)
		held.Fullest = nil // agrees has compared it
		require.Equal(t, Stats{Queued: clients, Incomplete: unknown, Limit: n * 128, Capacity: n * 129}, held)
		require.Equal(t, overflows, testkit.KernelCounter(t, "ListenOverflows"))

		served := make(chan error, 1)
		go func() { served <- s.Serve(testkit.Echo) }()
		require.NoError(t, testkit.AskAll(conns))
		last := agrees(t, s)
		require.Zero(t, last.Queued)
		require.Zero(t, last.Drops)
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-served, net.ErrClosed)
	})
}

// A full shard drops clients while another shard has room. The drops show which shard.
func TestAFullShardDrops(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		const n, limit = 8, 4
		s, err := ListenTCPShards("127.0.0.1:0", n, WithBacklog(limit))
		require.NoError(t, err)
		defer s.Close()
		in := testkit.ConnectUntilFull(t, s.Addr(), n*(limit+1)+1)
		require.LessOrEqual(t, len(in), n*(limit+1))
		sum := agrees(t, s)
		require.Equal(t, len(in), sum.Queued)
		require.Positive(t, sum.Drops)
		for l := range s.All() {
			q, err := l.Stats()
			require.NoError(t, err)
			if q.Drops > 0 {
				require.Equal(t, limit+1, q.Queued, "only a full one drops")
			}
		}
	})
}

func TestShardsSetBacklog(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 128)
		const n = 4
		_, err := ListenTCPShards("127.0.0.1:4321", n, WithBacklog(129), WithStrictBacklog())
		var clamp *ClampError
		require.ErrorAs(t, err, &clamp)
		again, err := ListenTCP("127.0.0.1:4321")
		require.NoError(t, err, "no socket is left")
		require.NoError(t, again.Close())

		s, err := ListenTCPShards("127.0.0.1:4321", n, WithBacklog(5), WithStrictBacklog())
		require.NoError(t, err)
		defer s.Close()
		for _, limit := range []int{64, 3, 128} {
			accounts, err := s.SetBacklog(limit)
			require.NoError(t, err)
			require.Equal(t, slices.Repeat(Backlogs{shardsOf(s)[0].Backlog()}, n), accounts)
			require.Equal(t, limit, accounts[0].Limit)
			require.Equal(t, n*limit, s.EffectiveBacklog())
			require.Equal(t, n*limit, agrees(t, s).Limit)
		}
		accounts, err := s.SetBacklog(4096)
		require.ErrorAs(t, err, &clamp)
		require.Equal(t, s.Backlogs(), accounts)
		require.Equal(t, n*128, agrees(t, s).Limit, "with WithStrictBacklog the limit must stay")

		require.NoError(t, shardsOf(s)[2].Close())
		accounts, err = s.SetBacklog(7)
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, []int{7, 7, 128, 128}, []int{accounts[0].Limit, accounts[1].Limit, accounts[2].Limit, accounts[3].Limit},
			"the shards after the first error keep their limit")
		q, err := s.Stats()
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, unknownStats, q)
		require.ErrorIs(t, s.Close(), net.ErrClosed)
		for l := range s.All() {
			require.ErrorIs(t, l.Close(), net.ErrClosed, "the other shards must be closed too")
		}
	})
}

// A sum with an unknown part is unknown: here the drops of an MPTCP listener.
func TestShardsStatsWithAnUnknownPart(t *testing.T) {
	s := apart(t, 2)
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(true)
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l, err := Wrap(ln)
	require.NoError(t, err)
	s.listeners = append(shardsOf(s), l)
	if testkit.Option(t, l.TCPListener(), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_PROTOCOL}) == unix.IPPROTO_TCP {
		return // a kernel without MPTCP
	}
	q, err := s.Stats()
	require.NoError(t, err)
	require.EqualValues(t, unknown, q.Drops)
	require.Zero(t, q.Queued)
	require.Positive(t, q.Limit)
}

// seedEnv has the seed with which a test in random order repeats an earlier run.
const seedEnv = "ACCEPTQ_SEED"

func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("%s=%d", seedEnv, seed)
	return seed
}

// A subject is a Listener or Shards that random users call.
type subject struct {
	listeners  []*Listener
	stats      func() (Stats, error)
	setBacklog func(n int) error
	drain      func(ctx context.Context) error
	close      func() error
}

// A model holds what must be true of a subject.
type model struct {
	subject
	ceiling   int
	last      []int // for each user, the number of its last SetBacklog
	connected atomic.Int64
	served    atomic.Int64
	refused   atomic.Int64
}

// granted returns the limit for a request of n.
func (m *model) granted(n int) int {
	if n < 0 || n > m.ceiling {
		return m.ceiling
	}
	return n
}

// accepts answers clients until the listener is closed. Other users set the deadlines.
func (m *model) accepts(t *testing.T, l *Listener, accept func() (net.Conn, error), answers *sync.WaitGroup) {
	for {
		c, err := accept()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.SetDeadline(time.Time{}) // fails if the listener was closed, as Accept will
			continue
		}
		if err != nil {
			assert.ErrorIs(t, err, net.ErrClosed)
			return
		}
		answers.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(testkit.Patience))
			p := make([]byte, 4)
			if _, err := io.ReadFull(c, p); assert.NoError(t, err) {
				c.Write(p)
			}
		})
	}
}

// comes connects one client. A client that gets in must be served.
func (m *model) comes(t *testing.T) {
	c, err := net.DialTimeout("tcp", m.listeners[0].Addr().String(), testkit.Patience)
	if err != nil {
		m.refused.Add(1)
		return
	}
	defer c.Close()
	m.connected.Add(1)
	c.SetDeadline(time.Now().Add(testkit.Patience))
	_, err = c.Write([]byte("word"))
	assert.NoError(t, err)
	if _, err := io.ReadFull(c, make([]byte, 4)); assert.NoError(t, err, "a client that was let in is lost") {
		m.served.Add(1)
	}
}

// use calls one method, which must succeed until the end.
func (m *model) use(t *testing.T, user int, r *rand.Rand) {
	l := m.listeners[r.IntN(len(m.listeners))]
	switch op := r.IntN(14); op {
	case 0, 1, 2:
		m.comes(t)
	case 3:
		s, err := m.stats()
		assert.NoError(t, err)
		assert.GreaterOrEqual(t, s.Queued, 0)
	case 4:
		s, err := ReadStats(l)
		assert.NoError(t, err)
		assert.Equal(t, s.Limit+1, s.Capacity)
	case 5:
		n := []int{32, 64, 100, -1, -5, 1 << 20}[r.IntN(6)]
		assert.NoError(t, m.setBacklog(n))
		m.last[user] = n
	case 6:
		b := l.Backlog()
		assert.Equal(t, m.granted(b.Requested), b.Limit)
		assert.True(t, b.Measured)
	case 7:
		assert.GreaterOrEqual(t, l.EffectiveBacklog(), 32)
	case 8:
		w, err := Wrap(l.TCPListener())
		if assert.NoError(t, err) {
			_, err = w.Stats()
			assert.NoError(t, err)
		}
	case 9:
		f, err := l.File()
		if assert.NoError(t, err) {
			assert.NoError(t, f.Close())
		}
	case 10:
		raw, err := l.SyscallConn()
		if assert.NoError(t, err) {
			assert.NoError(t, raw.Control(func(uintptr) {}))
		}
	case 11:
		assert.NoError(t, l.SetDeadline(time.Now().Add(time.Duration(r.IntN(4)-1)*time.Millisecond)))
	case 12:
		_, err := ReadSystem()
		assert.NoError(t, err)
		assert.NotNil(t, l.Addr())
	case 13:
		if r.IntN(4) > 0 { // a client that connects during a drain retries a second later
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(10))*time.Millisecond)
		defer cancel()
		if err := m.drain(ctx); !errors.Is(err, ErrStillOpen) {
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		}
	}
}

// run lets users call methods at random. Then it drains and closes while clients still
// connect.
func (m *model) run(t *testing.T, seed uint64) {
	const users, uses = 8, 60
	b, err := predict(&sys.Real, -1)
	require.NoError(t, err)
	m.ceiling = b.Ceiling
	require.GreaterOrEqual(t, m.ceiling, 100)
	m.last = make([]int, users)
	for i := range m.last {
		m.last[i] = 64
	}
	var loops, answers sync.WaitGroup
	for _, l := range m.listeners {
		// The socket may have another holder, so a drain is undone when it ends.
		f, err := l.File()
		require.NoError(t, err)
		require.NoError(t, f.Close())
		loops.Go(func() { m.accepts(t, l, l.Accept, &answers) })
		loops.Go(func() { m.accepts(t, l, func() (net.Conn, error) { return l.AcceptTCP() }, &answers) })
	}
	testkit.Each(users, func(user int) {
		r := rand.New(rand.NewPCG(seed, uint64(user)))
		for range uses {
			m.use(t, user, r)
		}
	})
	assert.Zero(t, m.refused.Load(), "it was open all the time")
	assert.Equal(t, m.connected.Load(), m.served.Load())
	for _, l := range m.listeners {
		s, err := l.Stats()
		assert.NoError(t, err)
		assert.Equal(t, l.Backlog().Limit, s.Limit)
		var possible []int
		for _, n := range m.last {
			possible = append(possible, m.granted(n))
		}
		assert.Contains(t, possible, s.Limit, "as the last one set it")
	}

	var clients sync.WaitGroup
	closed := make(chan struct{})
	for range users {
		clients.Go(func() {
			for {
				select {
				case <-closed:
					return
				default:
					m.comes(t)
				}
			}
		})
	}
	was := m.served.Load()
	assert.True(t, testkit.Eventually(func() bool { return m.served.Load() >= was+users }))
	// The socket is shared, so a client that connects between the end of the drain and
	// Close would be lost. For the last drain it is marked as not shared.
	for _, l := range m.listeners {
		l.intake.Mu.Lock()
		l.intake.Shared = false
		l.intake.Shown.Store(false)
		l.intake.Mu.Unlock()
	}
	assert.NoError(t, m.drain(testkit.Within(t, testkit.Patience)))
	assert.NoError(t, m.close())
	close(closed)
	clients.Wait()
	loops.Wait()
	answers.Wait()
	assert.Equal(t, m.connected.Load(), m.served.Load())
	t.Logf("%d clients served, %d came too late", m.served.Load(), m.refused.Load())

	// After Close every method returns net.ErrClosed, also with concurrent callers.
	testkit.Each(users, func(int) {
		for _, l := range m.listeners {
			for name, err := range map[string]error{
				"Accept":      second(l.Accept()),
				"AcceptTCP":   second(l.AcceptTCP()),
				"Stats":       second(l.Stats()),
				"ReadStats":   second(ReadStats(l)),
				"SetBacklog":  second(l.SetBacklog(1)),
				"Drain":       l.Drain(t.Context()),
				"File":        second(l.File()),
				"Wrap":        second(Wrap(l.TCPListener())),
				"SetDeadline": l.SetDeadline(time.Now()),
				"Close":       l.Close(),
				"of all":      m.drain(t.Context()),
				"all's Stats": second(m.stats()),
				"all's limit": m.setBacklog(1),
			} {
				assert.ErrorIs(t, err, net.ErrClosed, name)
			}
			assert.NotNil(t, l.Addr())
			assert.NotZero(t, l.EffectiveBacklog())
		}
	})
}

func second[T any](_ T, err error) error { return err }

// Users call methods in any order. The limit must be that of the last SetBacklog, no client
// may be lost, and a closed listener must stay closed.
func TestModel(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		seed := seedOf(t)
		t.Run("Listener", func(t *testing.T) {
			t.Parallel()
			l, err := ListenTCP("127.0.0.1:0", WithBacklog(64))
			require.NoError(t, err)
			(&model{subject: subject{
				listeners: []*Listener{l},
				stats:     l.Stats,
				setBacklog: func(n int) error {
					b, err := l.SetBacklog(n)
					if err == nil && b.Requested != max(n, -1) {
						t.Errorf("SetBacklog(%d): %+v", n, b)
					}
					return err
				},
				drain: l.Drain, close: l.Close,
			}}).run(t, seed)
		})
		t.Run("Shards", func(t *testing.T) {
			t.Parallel()
			s, err := ListenTCPShards("127.0.0.1:0", 3, WithBacklog(64))
			require.NoError(t, err)
			(&model{subject: subject{
				listeners: shardsOf(s), stats: s.Stats,
				setBacklog: func(n int) error {
					accounts, err := s.SetBacklog(n)
					assert.Len(t, accounts, 3)
					return err
				},
				drain: s.Drain, close: s.Close,
			}}).run(t, seed)
		})
	})
}

// The recipes of the examples that need a privilege log nothing if they have it.
func TestControlRecipes(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		self, err := os.Executable()
		require.NoError(t, err)
		recipes := []string{"bindToDevice", "congestion", "dscp", "freeBind", "mark", "maxSegment", "transparent", "userTimeout"}
		cmd := exec.Command(self, "-test.v", "-test.run=^ExampleWithControl_("+strings.Join(recipes, "|")+")$")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		stdout, err := cmd.Output()
		require.NoError(t, err)
		require.Empty(t, stderr.String(), "an example logs only errors")
		require.Equal(t, len(recipes), strings.Count(string(stdout), "--- PASS: ExampleWithControl_"))
	})
}

var ourMaker = testkit.Maker{Name: "acceptq.Listen", Listen: listenOurs()}

func listenOurs(opts ...Option) func(network, address string) (net.Listener, error) {
	return func(network, address string) (net.Listener, error) {
		ln, err := Listen(context.Background(), network, address, opts...)
		if err != nil {
			return nil, err // not a nil *Listener in a non-nil interface
		}
		return ln, nil
	}
}

// listenIPv4 listens on a free port of 127.0.0.1 until the test ends.
func listenIPv4(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	ln, err := Listen(t.Context(), "tcp4", "127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}
