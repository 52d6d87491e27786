package testkit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// NamespaceEnv is set in a test process that runs in its own namespaces.
const NamespaceEnv = "ACCEPTQ_TEST_NAMESPACE"

// KernelCounter reads one counter of the TcpExt lines of this namespace. It does not use
// the library, so that tests can compare the library with it.
func KernelCounter(t *testing.T, name string) int64 {
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

// KernelQueue returns the number of queued connections of the listener at addr: the
// rx_queue column of its row in /proc/net/tcp or tcp6.
func KernelQueue(t *testing.T, addr net.Addr) int {
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

// ConnectUntilFull connects clients to addr, one at a time, until the queue is full and the
// kernel drops one, or until limit clients are connected. It returns the connections, which
// are closed when the test ends.
//
// It uses the kernel's counter, not a timeout, to tell that the queue is full.
func ConnectUntilFull(t *testing.T, addr net.Addr, limit int) (clients []net.Conn) {
	t.Helper()
	for len(clients) < limit {
		c := ConnectOne(t, addr)
		if c == nil {
			break
		}
		clients = append(clients, c)
	}
	return clients
}

// ConnectOne connects one client. It returns nil if the queue of addr is full.
func ConnectOne(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	before := KernelCounter(t, "ListenOverflows")
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
			if KernelCounter(t, "ListenOverflows") > before {
				cancel()
				if c := <-done; c != nil {
					c.Close()
				}
				return nil
			}
		}
	}
}

// LateACK makes a client delay the final ACK of its handshake until it sends data, or for
// 200 ms. Until then the handshake is in flight for the server.
func LateACK(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
	return errors.Join(cerr, err)
}

// Unanswered holds the connections of a server without an answer so far.
type Unanswered struct {
	mu    sync.Mutex
	Conns map[net.Conn]struct{}
}

func (u *Unanswered) Note(c net.Conn, state http.ConnState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch state {
	case http.StateNew:
		u.Conns[c] = struct{}{}
	case http.StateIdle, http.StateHijacked, http.StateClosed:
		delete(u.Conns, c)
	}
}

func (u *Unanswered) None() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.Conns) == 0
}

func SetMinTTL(raw syscall.RawConn, n int) (err error) {
	cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL, n)
		if v6 := unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, n); v6 == nil {
			err = nil
		}
	})
	return errors.Join(cerr, err)
}

// SynReceived counts the handshakes in flight of a port, in /proc/net/tcp. A row can occur
// twice if the table changes while it is read.
func SynReceived(t *testing.T, addr net.Addr) int {
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

// RequireDropped requires that a client neither gets in nor is refused.
func RequireDropped(t *testing.T, err error) {
	t.Helper()
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), err)
}

// Talk sends a message both ways twice between c and its peer s.
func Talk(t *testing.T, c, s net.Conn) {
	t.Helper()
	for range 2 {
		for _, end := range [][2]net.Conn{{c, s}, {s, c}} {
			require.NoError(t, end[0].SetDeadline(time.Now().Add(Patience)))
			require.NoError(t, end[1].SetDeadline(time.Now().Add(Patience)))
			_, err := end[0].Write([]byte("word"))
			require.NoError(t, err)
			p := make([]byte, 4)
			_, err = io.ReadFull(end[1], p)
			require.NoError(t, err)
		}
	}
}
