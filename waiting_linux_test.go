package acceptq

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// dump finds the listeners and the connections of a port. Its rows keep what the kernel
// reported.
func TestDump(t *testing.T) {
	ln := listenIPv4(t, WithBacklog(7))
	client := dialed(t, ln, 1)[0]
	of := func(states uint32) []sockdiag.Row {
		rows, err := sockdiag.Dump(&sys.Real, t.Context(), sockdiag.Request{Family: unix.AF_INET, Port: ln.Addr().(*net.TCPAddr).AddrPort().Port(), States: states, Extensions: 1 << (sockdiag.DiagInfo - 1)}, func(sockdiag.Row) bool { return true })
		require.NoError(t, err)
		require.Len(t, rows, 1)
		return rows
	}
	l := of(1 << tcpinfo.Listen)[0]
	require.EqualValues(t, inode(t, ln), l.Inode)
	require.EqualValues(t, unix.AF_INET, l.Family)
	require.Equal(t, ln.Addr().String(), l.Local.String())
	require.EqualValues(t, 1, l.Rqueue)
	require.EqualValues(t, 7, l.Wqueue)
	require.EqualValues(t, os.Getuid(), l.UID)
	require.EqualValues(t, tcpinfo.Listen, l.Info[tcpinfo.State])
	c := of(1 << tcpinfo.Established)[0]
	require.Zero(t, c.Inode)
	require.Equal(t, client.LocalAddr().String(), c.Client.String())
	require.EqualValues(t, tcpinfo.Established, c.Info[tcpinfo.State])
	require.NotZero(t, c.Cookie)
}

// Commands of bpf(2) and constants of linux/bpf.h.
const (
	bpfMapCreate, bpfMapUpdate, bpfProgLoad, bpfLinkCreate = 0, 2, 5, 28

	bpfSockmap, bpfSkLookup, bpfAttachSkLookup = 15, 30, 36

	bpfCallLookup, bpfCallRelease, bpfCallAssign = 1, 86, 124

	bpfLookupPort = 60 // offset of local_port in struct bpf_sk_lookup, in host byte order
)

// bpf calls bpf(2) with an attribute and returns a descriptor.
func bpf[A any](t *testing.T, command uintptr, attr *A) int {
	t.Helper()
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno == unix.EPERM || errno == unix.ENOSYS {
		t.Skip("bpf(2) is not allowed here: run as root, in the user namespace of the system")
	}
	require.Zero(t, errno, "bpf command %d", command)
	return int(fd)
}

// steerPortTo gives ln the clients of a local port, in the namespace of this test. It uses
// a program of type sk_lookup.
func steerPortTo(t *testing.T, port int, ln *Listener) {
	t.Helper()
	sockets := bpf(t, bpfMapCreate, &struct{ kind, key, value, entries, flags, _ uint32 }{bpfSockmap, 4, 8, 1, 0, 0})
	t.Cleanup(func() { unix.Close(sockets) })
	require.NoError(t, ln.intake.Raw.Control(func(fd uintptr) {
		key, value := new(uint32), new(uint64)
		*value = uint64(fd)
		bpf(t, bpfMapUpdate, &struct {
			fd, _             uint32
			key, value, flags uint64
		}{uint32(sockets), 0, uint64(uintptr(unsafe.Pointer(key))), uint64(uintptr(unsafe.Pointer(value))), 0})
		runtime.KeepAlive(key)
		runtime.KeepAlive(value)
	}))
	var code []byte
	ins := func(op, dst, src byte, offset int16, immediate int32) {
		registers := dst | src<<4
		if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
			registers = dst<<4 | src
		}
		code = append(code, op, registers)
		code = binary.NativeEndian.AppendUint16(code, uint16(offset))
		code = binary.NativeEndian.AppendUint32(code, uint32(immediate))
	}
	ins(0xbf, 6, 1, 0, 0)              // r6 = context
	ins(0x61, 2, 6, bpfLookupPort, 0)  // r2 = local port
	ins(0x55, 2, 0, 14, int32(port))   // if it is another port, goto pass
	ins(0x62, 10, 0, -4, 0)            // key = 0
	ins(0x18, 1, 1, 0, int32(sockets)) // r1 = sockets
	ins(0, 0, 0, 0, 0)                 // the second half of the address
	ins(0xbf, 2, 10, 0, 0)             // r2 = &key
	ins(0x07, 2, 0, 0, -4)             //
	ins(0x85, 0, 0, 0, bpfCallLookup)  // r0 = the socket
	ins(0x15, 0, 0, 7, 0)              // if there is none, goto pass
	ins(0xbf, 7, 0, 0, 0)              // r7 = the socket
	ins(0xbf, 1, 6, 0, 0)              // assign(context, socket, 0)
	ins(0xbf, 2, 7, 0, 0)              //
	ins(0xb7, 3, 0, 0, 0)              //
	ins(0x85, 0, 0, 0, bpfCallAssign)  //
	ins(0xbf, 1, 7, 0, 0)              // release(socket)
	ins(0x85, 0, 0, 0, bpfCallRelease) //
	ins(0xb7, 0, 0, 0, 1)              // pass: return SK_PASS
	ins(0x95, 0, 0, 0, 0)              // exit
	license := []byte("GPL\x00")
	program := bpf(t, bpfProgLoad, &struct {
		kind, count             uint32
		code, license           uint64
		logLevel, logSize       uint32
		log                     uint64
		version, flags          uint32
		name                    [16]byte
		ifindex, expectedAttach uint32
	}{
		kind: bpfSkLookup, count: uint32(len(code) / 8), code: uint64(uintptr(unsafe.Pointer(&code[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))), expectedAttach: bpfAttachSkLookup,
	})
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	defer unix.Close(program)
	ns, err := os.Open("/proc/thread-self/ns/net")
	require.NoError(t, err)
	defer ns.Close()
	link := bpf(t, bpfLinkCreate, &struct{ program, target, kind, flags uint32 }{uint32(program), uint32(ns.Fd()), bpfAttachSkLookup, 0})
	t.Cleanup(func() { unix.Close(link) })
}

// waitingBecomes waits until n connections are listed. The handshake of a client can end
// before that of the server.
func waitingBecomes(t *testing.T, n int, list func(context.Context) ([]Waiting, error)) (all []Waiting) {
	t.Helper()
	require.Eventually(t, func() bool {
		var err error
		all, err = list(t.Context())
		require.NoError(t, err)
		return len(all) == n
	}, testkit.Patience, 5*time.Millisecond, "never were %d listed", n)
	return all
}

func clientsOf(all []Waiting) (clients []string) {
	for _, w := range all {
		clients = append(clients, w.Client.String())
	}
	slices.Sort(clients)
	return clients
}

func addressesOf(conns ...net.Conn) (addresses []string) {
	for _, c := range conns {
		addresses = append(addresses, c.LocalAddr().String())
	}
	slices.Sort(addresses)
	return addresses
}

// A hundred clients wait, and thirty of them have closed. Each is listed with its time and
// its bytes, the longest wait first. The thirty are marked as closed.
func TestWaitingListsTheQueue(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		const n, closed = 100, 30
		ln := listenIPv4(t, WithBacklog(n))
		type client struct {
			wait
			received int
			closed   bool
		}
		clients := make(map[string]client)
		for i := range n {
			c, w := joinQueue(t, ln.Addr(), i+1, func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) })
			sent := make([]byte, i%4*100)
			_, err := c.Write(sent)
			require.NoError(t, err)
			if i%10 < 10*closed/n {
				require.NoError(t, c.Close())
			}
			clients[c.LocalAddr().String()] = client{w, len(sent), i%10 < 10*closed/n}
		}
		// The last packets of the clients may still be in flight.
		var all []Waiting
		var before, after time.Duration
		require.Eventually(t, func() bool {
			before = now()
			var err error
			all, err = ln.Waiting(t.Context())
			after = now()
			require.NoError(t, err)
			var marked int
			for _, w := range all {
				if w.Closed {
					marked++
				}
			}
			return len(all) == n && marked == closed
		}, testkit.Patience, 10*time.Millisecond)

		slack := tick(t) * 3 / 2
		for i, w := range all {
			c, ok := clients[w.Client.String()]
			require.True(t, ok, "%v", w)
			delete(clients, w.Client.String())
			require.Equal(t, c.closed, w.Closed, "%v", w)
			require.EqualValues(t, c.received, w.Received, "%v", w)
			require.False(t, w.Shared, "%v", w)
			require.GreaterOrEqual(t, w.Waited, before-c.before-slack, "%v", w)
			require.LessOrEqual(t, w.Waited, after-c.after+slack, "%v", w)
			require.True(t, i == 0 || w.Waited <= all[i-1].Waited, "the longest wait first")
		}
		require.Empty(t, clients)

		// Accepted connections are no longer listed.
		s, err := ln.Accept()
		require.NoError(t, err)
		defer s.Close()
		all, err = ln.Waiting(t.Context())
		require.NoError(t, err)
		require.Len(t, all, n-1)
		require.NotContains(t, clientsOf(all), s.RemoteAddr().String())
	})
}

// Handshakes in flight, held-back connections and connections of other ports are not
// listed. A connection that was reset is in the queue, but the kernel does not list it.
func TestWaitingListsNothingElse(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listenIPv4(t)
		all, err := ln.Waiting(t.Context())
		require.NoError(t, err)
		require.Empty(t, all)

		other := listenIPv4(t)
		dialed(t, other, 2)
		newDeafClient(t, ln.Addr())
		held := listenIPv4(t, WithDeferAccept(30*time.Second))
		h, err := net.Dial("tcp", held.Addr().String())
		require.NoError(t, err)
		defer h.Close()
		queued := dialed(t, ln, 2)
		require.NoError(t, queued[0].(*net.TCPConn).SetLinger(0))
		require.NoError(t, queued[0].Close())

		all = waitingBecomes(t, 1, ln.Waiting)
		require.Equal(t, addressesOf(queued[1]), clientsOf(all))
		require.Equal(t, 2, queuedBecomes(t, 2, ln.Stats).Queued)
		waitingBecomes(t, 2, other.Waiting)
		waitingBecomes(t, 0, held.Waiting)
	})
}

// Clients of both families, on sockets for one family and for both.
func TestWaitingFamilies(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		haveIPv6(t)
		for _, row := range []struct{ network, address, client string }{
			{"tcp4", "127.0.0.1:0", "127.0.0.1"},
			{"tcp4", ":0", "127.0.0.1"},
			{"tcp6", "[::1]:0", "::1"},
			{"tcp6", ":0", "::1"},
			{"tcp", ":0", "::1"},
			{"tcp", ":0", "127.0.0.1"},
		} {
			t.Run(row.network+" "+row.address+" "+row.client, func(t *testing.T) {
				ln, err := Listen(t.Context(), row.network, row.address)
				require.NoError(t, err)
				defer ln.Close()
				port := fmt.Sprint(ln.Addr().(*net.TCPAddr).Port)
				c, err := net.Dial("tcp", net.JoinHostPort(row.client, port))
				require.NoError(t, err)
				defer c.Close()
				all := waitingBecomes(t, 1, ln.Waiting)
				require.Equal(t, addressesOf(c), clientsOf(all))
				s, err := ln.Accept()
				require.NoError(t, err)
				defer s.Close()
				require.Equal(t, s.RemoteAddr().String(), all[0].Client.String())
			})
		}
		t.Run("link-local", func(t *testing.T) {
			lo, err := net.InterfaceByName("lo")
			require.NoError(t, err)
			testkit.AddLinkLocal(t, net.ParseIP("fe80::77"), int32(lo.Index))
			var ln *Listener
			require.Eventually(t, func() bool { // the kernel may still check for a duplicate address
				ln, err = ListenTCP("[fe80::77%lo]:0")
				return err == nil
			}, testkit.Patience, time.Millisecond)
			defer ln.Close()
			c, err := net.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			defer c.Close()
			require.Equal(t, addressesOf(c), clientsOf(waitingBecomes(t, 1, ln.Waiting)))
		})
	})
}

// A connection that may be in the queue of another listener is marked as shared.
func TestWaitingShared(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		shared := func(all []Waiting) (n int) {
			for _, w := range all {
				if w.Shared {
					n++
				}
			}
			return n
		}
		dial := func(t *testing.T, addr string, n int) {
			for range n {
				c, err := net.Dial("tcp", addr)
				require.NoError(t, err)
				t.Cleanup(func() { c.Close() })
			}
		}
		t.Run("one address", func(t *testing.T) {
			a := listenIPv4(t, WithReusePort())
			dial(t, a.Addr().String(), 5)
			require.Zero(t, shared(waitingBecomes(t, 5, a.Waiting)))
			b, err := ListenTCP(a.Addr().String(), WithReusePort())
			require.NoError(t, err)
			defer b.Close()
			dial(t, a.Addr().String(), 5)
			require.Equal(t, 10, shared(waitingBecomes(t, 10, a.Waiting)))
			require.Equal(t, 10, shared(waitingBecomes(t, 10, b.Waiting)))
		})
		t.Run("two addresses", func(t *testing.T) {
			all, err := Listen(t.Context(), "tcp4", "0.0.0.0:0", WithReusePort())
			require.NoError(t, err)
			defer all.Close()
			port := all.Addr().(*net.TCPAddr).Port
			one, err := Listen(t.Context(), "tcp4", fmt.Sprintf("127.0.0.2:%d", port), WithReusePort())
			require.NoError(t, err)
			defer one.Close()
			dial(t, fmt.Sprintf("127.0.0.1:%d", port), 3)
			dial(t, fmt.Sprintf("127.0.0.2:%d", port), 4)
			require.Equal(t, 4, shared(waitingBecomes(t, 7, all.Waiting)))
			require.Equal(t, 4, shared(waitingBecomes(t, 4, one.Waiting)))
		})
		t.Run("two families", func(t *testing.T) {
			haveIPv6(t)
			v6, err := Listen(t.Context(), "tcp6", ":0")
			require.NoError(t, err)
			defer v6.Close()
			port := v6.Addr().(*net.TCPAddr).Port
			v4, err := Listen(t.Context(), "tcp4", fmt.Sprintf("0.0.0.0:%d", port))
			require.NoError(t, err)
			defer v4.Close()
			dial(t, fmt.Sprintf("127.0.0.1:%d", port), 3)
			dial(t, fmt.Sprintf("[::1]:%d", port), 4)
			require.Zero(t, shared(waitingBecomes(t, 3, v4.Waiting)))
			require.Zero(t, shared(waitingBecomes(t, 4, v6.Waiting)))
		})
		t.Run("shards", func(t *testing.T) {
			s, err := ListenTCPShards("127.0.0.1:0", 4, WithReusePort())
			require.NoError(t, err)
			defer s.Close()
			dial(t, s.Addr().String(), 12)
			require.Zero(t, shared(waitingBecomes(t, 12, s.Waiting)))
			require.Equal(t, 12, shared(waitingBecomes(t, 12, shardsOf(s)[0].Waiting)))
			other, err := ListenTCP(s.Addr().String(), WithReusePort())
			require.NoError(t, err)
			defer other.Close()
			require.Equal(t, 12, shared(waitingBecomes(t, 12, s.Waiting)))
		})
	})
}

// A fast-open connection is listed before its handshake ends.
func TestWaitingFastOpen(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_fastopen", 0x1|0x2|0x4|0x200) // both sides, without a cookie
		ln := listenIPv4(t, WithFastOpen(5))
		fastOpen(t, ln.Addr(), true)
		all := waitingBecomes(t, 1, ln.Waiting)
		require.EqualValues(t, 4, all[0].Received)
		require.Equal(t, 1, testkit.SynReceived(t, ln.Addr()), "its handshake has not ended")
		fastOpen(t, ln.Addr(), false)
		waitingBecomes(t, 2, ln.Waiting)
	})
}

// A listener of net.Listen has one client with MPTCP and one without.
func TestWaitingMPTCP(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listenMPTCP(t)
		var clients []net.Conn
		for _, multi := range []bool{true, false} {
			var d net.Dialer
			d.SetMultipathTCP(multi)
			c, err := d.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			defer c.Close()
			write(t, c)
			clients = append(clients, c)
		}
		var all []Waiting
		require.Eventually(t, func() bool {
			all = waitingBecomes(t, 2, ln.Waiting)
			return all[0].Received == 4 && all[1].Received == 4
		}, testkit.Patience, time.Millisecond)
		require.Equal(t, addressesOf(clients...), clientsOf(all))
		for left := 1; left >= 0; left-- {
			s, err := ln.Accept()
			require.NoError(t, err)
			defer s.Close()
			waitingBecomes(t, left, ln.Waiting)
		}
	})
}

// For a listener in another network namespace, Waiting reads the queue in that namespace.
func TestWaitingInAnotherNamespace(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		v := testkit.NewVisited(t)
		var ln *Listener
		var c net.Conn
		v.In(func() {
			var err error
			ln, err = ListenTCP("127.0.0.1:0")
			require.NoError(t, err)
			c, err = net.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
		})
		defer ln.Close()
		defer c.Close()
		require.Equal(t, addressesOf(c), clientsOf(waitingBecomes(t, 1, ln.Waiting)))

		// Without the privilege to enter it, Waiting returns an error and not an empty
		// list.
		k := sys.Real
		k.NamespaceFile = func(int) (*os.File, error) { return nil, unix.EPERM }
		ln.intake.Calls = &k
		_, err := ln.Waiting(t.Context())
		testkit.RequireOp(t, err, "waiting")
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, unix.EPERM)
	})
}

// Waiting works concurrently with Accept, Stats and other calls of Waiting.
func TestWaitingUnderLoad(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		const clients, each = 16, 20
		ln := listenIPv4(t, WithBacklog(clients))
		loop := serveEach(ln)
		stop := make(chan struct{})
		var asking, running sync.WaitGroup
		for range 3 {
			asking.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					all, err := ln.Waiting(t.Context())
					if listed := clientsOf(all); err != nil || len(slices.Compact(listed)) != len(all) {
						t.Errorf("%v, %v", all, err)
						return
					}
				}
			})
		}
		for range clients {
			running.Go(func() {
				for range each {
					c, err := net.Dial("tcp", ln.Addr().String())
					if err == nil {
						err = request(c)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		running.Wait()
		close(stop)
		asking.Wait()
		ln.Close()
		<-loop
	})
}

// Waiting needs no privilege. This test uses no namespace, so any user can run it.
func TestWaitingUnprivileged(t *testing.T) {
	ln := listenIPv4(t)
	clients := dialed(t, ln, 3)
	require.Equal(t, addressesOf(clients...), clientsOf(waitingBecomes(t, 3, ln.Waiting)))
}

// Waiting ends with ctx, even if the kernel does not answer.
func TestWaitingObeysContext(t *testing.T) {
	ln := listenIPv4(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	all, err := ln.Waiting(ended)
	require.Empty(t, all)
	testkit.RequireOp(t, err, "waiting")
	require.ErrorIs(t, err, context.Canceled)

	k := sys.Real
	k.Diag = testkit.Answered(func([]byte) (int, error) { return 0, unix.EAGAIN })
	ln.intake.Calls = &k
	_, err = ln.Waiting(testkit.Within(t, 20*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// A listener that is bound to a device gets only connections of that device.
func TestWaitingMayHave(t *testing.T) {
	at := func(address string, device uint32) sockdiag.Row {
		return sockdiag.Row{SocketID: sockdiag.SocketID{Local: netip.AddrPortFrom(netip.MustParseAddr(address), 80), Device: device}}
	}
	for _, row := range []struct {
		listener, conn sockdiag.Row
		may            bool
	}{
		{at("0.0.0.0", 0), at("10.0.0.1", 0), true},
		{at("0.0.0.0", 0), at("10.0.0.1", 2), true},
		{at("0.0.0.0", 2), at("10.0.0.1", 2), true},
		{at("0.0.0.0", 3), at("10.0.0.1", 2), false},
		{at("0.0.0.0", 3), at("10.0.0.1", 0), false},
		{at("10.0.0.1", 0), at("10.0.0.1", 0), true},
		{at("10.0.0.2", 0), at("10.0.0.1", 0), false},
		{at("::", 0), at("10.0.0.1", 0), true},
		{at("::", 0), at("fe80::1", 2), true},
		{at("fe80::1", 0), at("fe80::1", 2), true},
	} {
		require.Equal(t, row.may, mayHave(row.listener, row.conn), "%v", row)
	}
}

// queueRow is one row of sock_diag with a struct tcp_info of n bytes.
func queueRow(state uint8, inode uint32, cookie uint64, n int) []byte {
	row := make([]byte, sockdiag.DiagMsgSize)
	row[sockdiag.DiagFamily], row[sockdiag.DiagState] = unix.AF_INET, state
	copy(row[sockdiag.DiagSource:], []byte{127, 0, 0, 1})
	copy(row[sockdiag.DiagDest:], []byte{127, 0, 0, 1})
	binary.BigEndian.PutUint16(row[sockdiag.DiagClient:], uint16(cookie))
	binary.NativeEndian.PutUint64(row[sockdiag.DiagCookie:], cookie)
	binary.NativeEndian.PutUint32(row[sockdiag.DiagInode:], inode)
	if n < 0 {
		return row
	}
	info := make([]byte, n)
	for offset, value := range map[int]uint32{tcpinfo.State: uint32(state), tcpinfo.SendMSS: 536, tcpinfo.LastDataSent: 9, tcpinfo.BytesReceived: 7} {
		if offset+8 <= n {
			binary.NativeEndian.PutUint32(info[offset:], value)
		}
	}
	return append(row, testkit.AttributeOf(sockdiag.DiagInfo, info...)...)
}

// Incomplete or malformed answers of the kernel.
func TestWaitingOfOtherAnswers(t *testing.T) {
	ln := listenIPv4(t)
	inode := uint32(inode(t, ln))
	listener := queueRow(tcpinfo.Listen, inode, 1, 8)
	client := netip.MustParseAddrPort("127.0.0.1:2")
	whole := Waiting{Client: client, Waited: 9 * time.Millisecond, Received: 7}
	for _, row := range []struct {
		name string
		rows [][]byte
		want []Waiting
		err  error
	}{
		{"no rows", nil, nil, errors.ErrUnsupported},
		{"the listener is missing", [][]byte{queueRow(tcpinfo.Established, 0, 2, 200)}, nil, errors.ErrUnsupported},
		{"an empty queue", [][]byte{listener}, nil, nil},
		{"one", [][]byte{listener, queueRow(tcpinfo.Established, 0, 2, 200)}, []Waiting{whole}, nil},
		{"one connection twice", [][]byte{listener, queueRow(tcpinfo.Established, 0, 2, 200), queueRow(tcpinfo.Established, 0, 2, 200)}, []Waiting{whole}, nil},
		{"accepted", [][]byte{listener, queueRow(tcpinfo.Established, 5, 2, 200)}, nil, nil},
		{"a handshake in flight", [][]byte{listener, queueRow(tcpinfo.SynRecv, 0, 2, -1)}, nil, nil},
		{"an old kernel", [][]byte{listener, queueRow(tcpinfo.Established, 0, 2, 104)}, []Waiting{{Client: client, Waited: 9 * time.Millisecond, Received: -1}}, nil},
		{"a TCP_INFO without times", [][]byte{listener, queueRow(tcpinfo.Established, 0, 2, 20)}, []Waiting{{Client: client, Waited: -1, Received: -1}}, nil},
		{"a short row", [][]byte{listener, make([]byte, sockdiag.DiagMsgSize-1)}, nil, unix.EBADMSG},
		{"a short attribute", [][]byte{listener, append(queueRow(tcpinfo.Established, 0, 2, -1), 3, 0, 2, 0)}, nil, unix.EBADMSG},
		{"an attribute longer than the row", [][]byte{listener, append(queueRow(tcpinfo.Established, 0, 2, -1), 0xff, 0xff, 2, 0)}, nil, unix.EBADMSG},
	} {
		t.Run(row.name, func(t *testing.T) {
			k := sys.Real
			k.Diag = testkit.Listing(row.rows...)
			ln.intake.Calls = &k
			all, err := ln.Waiting(t.Context())
			require.ErrorIs(t, err, row.err)
			require.Len(t, all, len(row.want))
			if len(all) > 0 {
				require.Equal(t, row.want, all)
			}
			if err != nil {
				testkit.RequireOp(t, err, "waiting")
			}
		})
	}
}

func FuzzParseRow(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(queueRow(tcpinfo.Listen, 3, 4, 8))
	f.Add(queueRow(tcpinfo.Established, 0, 4, 240))
	f.Add(queueRow(tcpinfo.Established, 0, 4, -1))
	f.Fuzz(func(t *testing.T, p []byte) {
		whole := string(p)
		row, err := sockdiag.ParseRow(p)
		if string(p) != whole {
			t.Fatal("parseRow wrote into the row")
		}
		if err != nil {
			if row.Info != nil || row.Local.IsValid() {
				t.Fatal("an error together with an answer")
			}
			return
		}
		if len(row.Info) > len(p)-sockdiag.DiagMsgSize {
			t.Fatal("more info than the row has")
		}
		w := waitingOf(row, false)
		if w.Waited < unknown || w.Received < unknown {
			t.Fatal(w)
		}
		_ = w.String()
	})
}

// The kernel lists the accepted connections of the port too. Waiting needs no memory for
// them.
func TestWaitingBesideAcceptedConnections(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listenIPv4(t)
		allocations := func() float64 {
			return testing.AllocsPerRun(10, func() {
				if _, err := ln.Waiting(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		alone := allocations()
		const accepted = 200
		dialed(t, ln, accepted)
		for range accepted {
			s, err := ln.Accept()
			require.NoError(t, err)
			defer s.Close()
		}
		require.Empty(t, waitingBecomes(t, 0, ln.Waiting))
		require.Less(t, allocations(), alone+accepted/10)
	})
}

// A listener can get clients of other local ports and addresses. Their connections cannot
// be told apart from those of other listeners, so Waiting returns an error and not a list
// that lacks them.
func TestWaitingOfOtherPorts(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for name, address := range map[string]func(port int) string{
			"another port":    func(port int) string { return fmt.Sprintf("127.0.0.1:%d", port%60000+1) },
			"another address": func(port int) string { return fmt.Sprintf("127.0.0.2:%d", port) },
		} {
			t.Run(name, func(t *testing.T) {
				ln := listenIPv4(t)
				dialed(t, ln, 1)
				require.Len(t, waitingBecomes(t, 1, ln.Waiting), 1)
				to := netip.MustParseAddrPort(address(ln.Addr().(*net.TCPAddr).Port))
				steerPortTo(t, int(to.Port()), ln)
				for range 2 {
					c, err := net.DialTimeout("tcp", to.String(), testkit.Patience)
					require.NoError(t, err)
					defer c.Close()
				}
				queuedBecomes(t, 3, ln.Stats)
				for range 2 {
					s, err := ln.Accept()
					require.NoError(t, err)
					defer s.Close()
				}
				waitingCannotTell(t, ln)
			})
		}
	})
}

func TestWaitingOfTransparentListeners(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for network, option := range map[string][2]int{"tcp4": {unix.IPPROTO_IP, unix.IP_TRANSPARENT}, "tcp6": {unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT}} {
			t.Run("transparent, "+network, func(t *testing.T) {
				ln, err := Listen(t.Context(), network, ":0", withInt(option[0], option[1], 1))
				require.NoError(t, err)
				defer ln.Close()
				waitingCannotTell(t, ln)
			})
		}
	})
	for errno, want := range map[unix.Errno]bool{
		unix.ENOPROTOOPT: false, unix.EOPNOTSUPP: false, // the socket does not have the option
		unix.EPERM: true, unix.ENOSYS: true, // it may be set
	} {
		k := sys.Real
		k.GetsockoptInt = func(fd, level, name int) (int, error) {
			if level == unix.IPPROTO_IP && name == unix.IP_TRANSPARENT {
				return 0, errno
			}
			return unix.GetsockoptInt(fd, level, name)
		}
		require.Equal(t, want, listen4(t, k).intake.ServesOtherPorts(), "%v", errno)
	}
}

// waitingCannotTell requires an error and no list.
func waitingCannotTell(t *testing.T, ln *Listener) {
	t.Helper()
	all, err := ln.Waiting(t.Context())
	require.Nil(t, all)
	testkit.RequireOp(t, err, "waiting")
	require.ErrorIs(t, err, errors.ErrUnsupported)
}
