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

// namespaceEnv is set in a test process that runs in its own namespaces.
const namespaceEnv = "ACCEPTQ_TEST_NAMESPACE"

// inNamespace runs f in a new network and mount namespace: its counters start at 0, the
// test may set its sysctls, and the test is root there. It starts the test binary again for
// that, so this process does not change. Without root it also creates a user namespace.
func inNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	limit := 10 * time.Minute
	if deadline, ok := t.Deadline(); ok { // a slow machine may use all the time that go test gives it
		limit = time.Until(deadline) - 5*time.Second
	}
	inNamespaceFor(t, limit, f)
}

// inNamespaceFor is like inNamespace, with a time limit.
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
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise each process ends a second later under -race
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
	t.Logf("in its own namespace:\n%s", &out)
	require.NoError(t, err)
	require.Contains(t, out.String(), "--- PASS: "+t.Name(), "the test did not run in the namespace")
}

// skipUnprivileged skips a test that lacks a privilege. In CI it fails the test.
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

// setSysctl sets a sysctl in the namespace of this test.
func setSysctl(t *testing.T, name string, value int) {
	t.Helper()
	require.NotEmpty(t, os.Getenv(namespaceEnv), "setSysctl may only run in a namespace of the test")
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	require.NoError(t, os.WriteFile(path, []byte(strconv.Itoa(value)), 0))
}

// kernelCounter reads one counter of the TcpExt lines of this namespace. It does not use
// the library, so that tests can compare the library with it.
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

// kernelQueue returns the number of queued connections of the listener at addr: the
// rx_queue column of its row in /proc/net/tcp or tcp6.
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

// connectUntilFull connects clients to addr, one at a time, until the queue is full and the
// kernel drops one, or until limit clients are connected. It returns the connections, which
// are closed when the test ends.
//
// It uses the kernel's counter, not a timeout, to tell that the queue is full.
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

// connectOne connects one client. It returns nil if the queue of addr is full.
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

// lateACK makes a client delay the final ACK of its handshake until it sends data, or for
// 200 ms. Until then the handshake is in flight for the server.
func lateACK(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
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
	d := net.Dialer{Timeout: 100 * time.Millisecond, Control: lateACK}
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

// unanswered holds the connections of a server without an answer so far.
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
	kernel func() kernel
	v4     way // on a socket without options of the user
}{
	{"filter", func() kernel { return realKernel }, way{len(dropSYN), 0, -1}},
	{"minimum TTL", withoutFilter, way{0, maxTTL, -1}},
}

func withoutFilter() kernel {
	k := realKernel
	k.attachFilter = func(int, *unix.SockFprog) error { return unix.EPERM }
	return k
}

// forEachStop runs f in a namespace, once with each of stops.
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

// connected returns the connection of a client for which hear was called.
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

// synReceived counts the handshakes in flight of a port, in /proc/net/tcp. A row can occur
// twice if the table changes while it is read.
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

// untilStopped waits until the drain keeps new clients out.
func untilStopped(t *testing.T, ln *Listener, want way) {
	t.Helper()
	require.Eventually(t, func() bool { return wayOf(t, ln.intake.raw) == want }, patience, time.Millisecond)
}

// requireDropped requires that a client neither gets in nor is refused.
func requireDropped(t *testing.T, err error) {
	t.Helper()
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), err)
}

// talk sends a message both ways twice between c and its peer s.
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

// requireStillOpen requires that a drain has waited for every client and lets new clients
// in.
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

// hidden has kernels whose ceiling cannot be read.
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

// fillOneByOne connects clients until the queue of ln has reached its capacity. It waits
// until each is in the queue before it connects the next, because only then the kernel
// enforces the limit exactly. One more client must be turned away.
func fillOneByOne(t *testing.T, ln net.Listener, capacity int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < capacity {
		c := connectOne(t, ln.Addr())
		require.NotNil(t, c, "full at %d of %d", len(clients), capacity)
		clients = append(clients, c)
		requireKernelQueue(t, ln.Addr(), len(clients))
	}
	require.Nil(t, connectOne(t, ln.Addr()), "the client above the capacity must be turned away")
	return clients
}

func requireKernelQueue(t *testing.T, addr net.Addr, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); kernelQueue(t, addr) != n; <-tick.C {
		require.True(t, time.Now().Before(deadline), "want %d queued, the kernel has %d", n, kernelQueue(t, addr))
	}
}

func instead(want, plain int) int {
	if want == unchanged {
		return plain
	}
	return want
}

// heapInUse returns the size of the live heap after a garbage collection.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // frees objects that a finalizer or a pool has kept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// heapSlack, in bytes, is more than the noise and less than a leak in each of thousands of
// listeners.
const heapSlack = 500_000

// exhaust opens descriptors until this process, which must be that of one test, has no
// free one.
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
