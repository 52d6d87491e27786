package acceptq

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// namespaceEnv is set in a test that runs in namespaces of its own.
const namespaceEnv = "ACCEPTQ_TEST_NAMESPACE"

// inNamespace runs f in a network and mount namespace that is made for this
// test alone: its counters start at 0, its sysctls may be set, and in it the
// test is root. The test binary is started again for that, so nothing of it
// remains in this process. Without root a user namespace is made too.
func inNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	limit := 10 * time.Minute
	if deadline, ok := t.Deadline(); ok { // a machine may be slow, and has as long as go test gives it
		limit = time.Until(deadline) - 5*time.Second
	}
	inNamespaceFor(t, limit, f)
}

// inNamespaceFor is inNamespace for a test that takes no longer than limit.
func inNamespaceFor(t *testing.T, limit time.Duration, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(namespaceEnv) != "" {
		require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		loopbackUp(t)
		f(t)
		return
	}
	self, err := os.Executable()
	require.NoError(t, err)
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=" + limit.String(), "-test.parallel=16"}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), namespaceEnv+"="+t.Name(),
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // or each one ends a second later under -race
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		skipUnprivileged(t, fmt.Sprintf("a namespace cannot be made here (%v): run as root, or allow unprivileged user namespaces", err))
	}
	err = cmd.Wait()
	t.Logf("in a namespace of its own:\n%s", &out)
	require.NoError(t, err)
	require.Contains(t, out.String(), "--- PASS: "+t.Name(), "the test did not run in the namespace")
}

// skipUnprivileged ends a test that lacks a privilege. In CI that is a failure.
func skipUnprivileged(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func loopbackUp(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	require.NoError(t, err)
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}

// setSysctl sets a sysctl of this test's own namespace.
func setSysctl(t *testing.T, name string, value int) {
	t.Helper()
	require.NotEmpty(t, os.Getenv(namespaceEnv), "only in a namespace of the test's own")
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	require.NoError(t, os.WriteFile(path, []byte(strconv.Itoa(value)), 0))
}

// kernelCounter reads one column of the TcpExt lines of this namespace, in the
// plainest way there is, as the judge of what the library says.
func kernelCounter(t *testing.T, name string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/netstat")
	require.NoError(t, err)
	lines := strings.Split(string(text), "\n")
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	for i := range names {
		if names[i] == name {
			n, err := strconv.ParseInt(values[i], 10, 64)
			require.NoError(t, err)
			return n
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// kernelQueue asks ss(8)'s source, the sock_diag file of the namespace, how many
// connections wait on the listener of addr: the rx_queue column of its row.
func kernelQueue(t *testing.T, addr net.Addr) int {
	t.Helper()
	a := addr.(*net.TCPAddr)
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) > 4 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", a.Port)) {
				_, rx, _ := strings.Cut(f[4], ":")
				n, err := strconv.ParseInt(rx, 16, 64)
				require.NoError(t, err)
				return int(n)
			}
		}
	}
	t.Fatalf("no listener at %v", addr)
	return 0
}

// connectUntilFull connects clients to addr, one at a time, until the kernel
// drops one for a full queue, or until limit clients are in. It returns those
// that are in; the test closes them when it ends.
//
// The kernel's own counter says that the queue is full, not a clock.
func connectUntilFull(t *testing.T, addr net.Addr, limit int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < limit {
		c := connectOne(t, addr)
		if c == nil {
			break
		}
		clients = append(clients, c)
	}
	return clients
}

// connectOne connects one client; nil if the queue of addr is full.
func connectOne(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	before := kernelCounter(t, "ListenOverflows")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan net.Conn, 1)
	go func() {
		c, err := new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
		if err != nil {
			c = nil
		}
		done <- c
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case c := <-done:
			require.NotNil(t, c, "neither connected nor counted as an overflow")
			t.Cleanup(func() { c.Close() })
			return c
		case <-tick.C:
			if kernelCounter(t, "ListenOverflows") > before {
				cancel()
				if c := <-done; c != nil {
					c.Close()
				}
				return nil
			}
		}
	}
}

// lateACK makes a client hold the final ACK of its handshake back until it sends
// something (or for 200 ms): to the server the handshake is in flight.
func lateACK(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
	return errors.Join(cerr, err)
}

// A crowd is clients that come again and again, until they are told to stop.
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

// end lets every client finish what it has begun.
func (c *crowd) end() {
	close(c.stop)
	c.wait.Wait()
}

func (c *crowd) run(id int, addr string) {
	// A SYN that is dropped is sent again after a second. These come again at
	// once, so that there is always somebody at the door.
	d := net.Dialer{Timeout: 100 * time.Millisecond, Control: lateACK}
	for i := id; ; i++ {
		select {
		case <-c.stop:
			return
		default:
		}
		conn, err := d.Dial("tcp", addr)
		if err != nil { // refused between two servers, or dropped by a drain: not lost
			<-time.After(time.Millisecond)
			continue
		}
		<-time.After(time.Duration(i%4*10) * time.Millisecond) // the time of this handshake
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

// request sends one request on conn, with which a held back ACK goes, and reads
// the whole answer.
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

// unanswered is the connections of a server that have not had an answer yet.
type unanswered struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func (u *unanswered) note(c net.Conn, state http.ConnState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch state {
	case http.StateNew:
		u.conns[c] = struct{}{}
	case http.StateIdle, http.StateHijacked, http.StateClosed:
		delete(u.conns, c)
	}
}

func (u *unanswered) none() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.conns) == 0
}

// way is the stop that is in force on a socket: the length of its filter, and
// what IP_MINTTL and IPV6_MINHOPCOUNT say (-1 if the socket has no such option).
type way struct{ filter, ttl, hops int }

func wayOf(t *testing.T, raw syscall.RawConn) (w way) {
	t.Helper()
	cerr := raw.Control(func(fd uintptr) {
		var err error
		if w.filter, err = getsockopt(int(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER, nil); err != nil {
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

// haveIPv6 ends a test where the kernel has none.
func haveIPv6(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	ln.Close()
}

// stops are the two ways of stopping the intake. In a namespace of its own a test
// may use the filter; refused, Drain takes the other.
var stops = []struct {
	name   string
	kernel func() kernel
	v4     way // in force on a socket that had nothing
}{
	{"filter", func() kernel { return realKernel }, way{len(dropSYN), 0, -1}},
	{"minimum TTL", withoutFilter, way{0, maxTTL, -1}},
}

func withoutFilter() kernel {
	k := realKernel
	k.attachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
	return k
}

// forEachStop runs f in a namespace, once with each way.
func forEachStop(t *testing.T, f func(t *testing.T, k kernel, v4 way)) {
	t.Helper()
	inNamespace(t, func(t *testing.T) {
		for _, stop := range stops {
			t.Run(stop.name, func(t *testing.T) { f(t, stop.kernel(), stop.v4) })
		}
	})
}

func listen4(t *testing.T, k kernel, opts ...Option) *Listener {
	t.Helper()
	ln, err := k.listenWith(t.Context(), "tcp4", "127.0.0.1:0", opts)
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

// A deafClient hears nothing from its server: a minimum TTL of its own drops the
// answers. Its handshake stays unfinished until hear is called, and then up to a
// second, until the server sends its SYN-ACK again.
type deafClient struct {
	raw  syscall.RawConn
	conn chan net.Conn // nil if it failed
}

func newDeafClient(t *testing.T, addr net.Addr) *deafClient {
	t.Helper()
	c := &deafClient{conn: make(chan net.Conn, 1)}
	before := synReceived(t, addr)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	raw := make(chan syscall.RawConn, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		d := net.Dialer{Control: func(_, _ string, r syscall.RawConn) error {
			raw <- r
			return setMinTTL(r, maxTTL)
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
	require.Eventually(t, func() bool { return synReceived(t, addr) == before+1 }, patience, time.Millisecond)
	return c
}

func (c *deafClient) hear(t *testing.T) { require.NoError(t, setMinTTL(c.raw, 0)) }

// connected is the connection of a client that hears.
func (c *deafClient) connected(t *testing.T) net.Conn {
	t.Helper()
	select {
	case conn := <-c.conn:
		require.NotNil(t, conn)
		t.Cleanup(func() { conn.Close() })
		return conn
	case <-time.After(patience):
		t.Fatal("the handshake was not finished")
		return nil
	}
}

func setMinTTL(raw syscall.RawConn, n int) (err error) {
	cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL, n)
		if v6 := unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, n); v6 == nil {
			err = nil
		}
	})
	return errors.Join(cerr, err)
}

// synReceived counts the unfinished handshakes of a port, in the text file that
// the kernel has of them. While that changes a row can show twice.
func synReceived(t *testing.T, addr net.Addr) int {
	t.Helper()
	clients := make(map[string]bool)
	port := fmt.Sprintf(":%04X", addr.(*net.TCPAddr).Port)
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], port) && f[3] == "03" {
				clients[f[2]] = true
			}
		}
	}
	return len(clients)
}

// untilStopped waits until the stop is in force.
func untilStopped(t *testing.T, ln *Listener, want way) {
	t.Helper()
	require.Eventually(t, func() bool { return wayOf(t, ln.raw) == want }, patience, time.Millisecond)
}

// requireDropped says that a client was neither let in nor refused.
func requireDropped(t *testing.T, err error) {
	t.Helper()
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), err)
}

// talk sends and answers twice over c, whose other end is s.
func talk(t *testing.T, c, s net.Conn) {
	t.Helper()
	for range 2 {
		for _, end := range [][2]net.Conn{{c, s}, {s, c}} {
			require.NoError(t, end[0].SetDeadline(time.Now().Add(patience)))
			require.NoError(t, end[1].SetDeadline(time.Now().Add(patience)))
			_, err := end[0].Write([]byte("word"))
			require.NoError(t, err)
			p := make([]byte, 4)
			_, err = io.ReadFull(end[1], p)
			require.NoError(t, err)
		}
	}
}

// requireStillOpen says that a drain waited for everybody and lets new clients in.
func requireStillOpen(t *testing.T, err error) {
	t.Helper()
	require.ErrorIs(t, err, ErrStillOpen)
	requireDrainOp(t, err)
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

// hidden are kernels whose ceiling cannot be read.
var hidden = map[string]func(k *kernel){
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

func ceilingFile(text string, err error) func(k *kernel) {
	return func(k *kernel) {
		k.readFile = func(string) ([]byte, error) { return []byte(text), err }
	}
}

// fillOneByOne connects clients until the queue of ln has its capacity, and sees
// each arrive there before the next comes: at that the kernel is exact. The next
// client must be turned away.
func fillOneByOne(t *testing.T, ln net.Listener, capacity int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < capacity {
		c := connectOne(t, ln.Addr())
		require.NotNil(t, c, "full at %d of %d", len(clients), capacity)
		clients = append(clients, c)
		requireKernelQueue(t, ln.Addr(), len(clients))
	}
	require.Nil(t, connectOne(t, ln.Addr()), "one more than fits")
	return clients
}

func requireKernelQueue(t *testing.T, addr net.Addr, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); kernelQueue(t, addr) != n; <-tick.C {
		require.True(t, time.Now().Before(deadline), "the kernel never had %d queued, but %d", n, kernelQueue(t, addr))
	}
}

func instead(want, plain int) int {
	if want == unchanged {
		return plain
	}
	return want
}

// heapInUse is what is live, after what is not was collected.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what a finalizer or a pool held back
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// heapSlack is more than the noise, in bytes, and less than a leak in each of thousands.
const heapSlack = 500_000

// exhaust takes every descriptor that this process, a test's own, may have.
func exhaust(t *testing.T) (files []*os.File) {
	t.Helper()
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 64}))
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			require.ErrorIs(t, err, unix.EMFILE)
			return files
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
}
