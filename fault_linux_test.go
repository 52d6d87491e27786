package acceptq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// unreadable has kernels whose sockets do not report their limit.
var unreadable = map[string]func(k *kernel){
	"EPERM":         answers(0, unix.EPERM),
	"ENOPROTOOPT":   answers(0, unix.ENOPROTOOPT),
	"EOPNOTSUPP":    answers(0, unix.EOPNOTSUPP),
	"nothing":       answers(0, nil),
	"a short one":   answers(infoQueueEnd-1, nil, tcpListen),
	"gVisor's":      answers(infoQueueEnd, nil), // all zeros
	"another state": answers(infoQueueEnd, nil, append([]byte{1}, bytes.Repeat([]byte{9}, infoQueueEnd-1)...)...),
}

// answers returns a function that answers TCP_INFO with n bytes that begin with info.
func answers(n int, err error, info ...byte) func(k *kernel) {
	return func(k *kernel) {
		k.getsockopt = func(_, _, _ int, p []byte) (int, error) {
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
			k := realKernel
			breaks(&k)
			ceilingFile("5\n", nil)(&k)
			for n, limit := range map[int]int{-1: 5, 0: 0, 2: 2, 5: 5, 6: 5} {
				ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n)})
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
			k := realKernel
			breaks(&k)
			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			require.NoError(t, err, "the limit comes from the socket")
			defer ln.Close()
			require.Equal(t, Backlog{
				Requested: 1, Ceiling: -1, Limit: 1, Effective: 1, Capacity: 2, Measured: true,
			}, ln.Backlog())

			b, err := k.predict(1)
			require.Error(t, err)
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, b)
		})
	}
}

func TestNothingCanBeRead(t *testing.T) {
	for name, breaks := range hidden {
		t.Run(name, func(t *testing.T) {
			k := realKernel
			unreadable["gVisor's"](&k)
			breaks(&k)
			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, ln.Backlog())
			require.Equal(t, -1, ln.EffectiveBacklog())

			var bound string
			k.bind = noteBound(t, &bound)
			err = refused(t, func() (*Listener, error) {
				return k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1), WithStrictBacklog()})
			})
			require.ErrorIs(t, err, errors.ErrUnsupported, "WithStrictBacklog needs the limit")
			freeAgain(t, "tcp", bound)
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
func willing() kernel {
	k := realKernel
	k.readFile = func(name string) ([]byte, error) {
		if strings.HasSuffix(name, "/tcp_fastopen") {
			return []byte("3\n"), nil
		}
		return realKernel.readFile(name)
	}
	return k
}

func kernelAnswers(all map[string][]answer) {
	all["getsockopt, of bytes"] = all["getsockopt"][:len(all["getsockopt"])-5]
	for _, n := range []int{0, infoQueueEnd - 1, infoQueueEnd, math.MaxInt32, -1} {
		for _, b := range []byte{0, tcpListen, 0xff} {
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
	for _, rows := range [][][]byte{nil, {nil}, {{1}}, {make([]byte, diagMsgSize-1)}, {make([]byte, diagMsgSize)},
		{bytes.Repeat([]byte{0xff}, diagMsgSize+9), make([]byte, diagMsgSize)}} {
		all["sock_diag"] = append(all["sock_diag"], answer{rows: rows})
	}
	all["read"] = refusals(unix.EACCES, unix.EPERM, unix.ENOENT, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EISDIR, unix.EAGAIN)
	for _, text := range []string{"", "\n", "\x00", "0", "-1\n", "1 2\n", "99999999999999999999\n", "TcpExt:", "TcpExt: ListenDrops\nTcpExt: -\n",
		strings.Repeat("9", 1<<16), strings.Repeat("TcpExt:\n", 1<<10)} {
		all["read"] = append(all["read"], answer{text: []byte(text)})
	}
}

func (m *meddler) ownCalls(k *kernel, base kernel, meddle func() answer) {
	k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		if m.turn("getsockopt, of bytes") {
			copy(p, meddle().text)
			return meddle().n, meddle().err
		}
		return base.getsockopt(fd, level, name, p)
	}
	others := k.getsockoptInt
	k.getsockoptInt = func(fd, level, name int) (int, error) {
		if level == unix.IPPROTO_IP && name == unix.IP_TRANSPARENT || level == unix.IPPROTO_IPV6 && name == unix.IPV6_TRANSPARENT {
			if m.turn("getsockopt, of a proxy") {
				return meddle().n, meddle().err
			}
			return base.getsockoptInt(fd, level, name)
		}
		return others(fd, level, name)
	}
	k.attachFilter = func(fd int, prog *unix.SockFprog) error {
		if m.turn("setsockopt of a filter") {
			return meddle().err
		}
		return base.attachFilter(fd, prog)
	}
	k.getFilter = func(fd int, p []unix.SockFilter) (int, error) {
		if m.turn("getsockopt of a filter") {
			return meddle().n, meddle().err
		}
		return base.getFilter(fd, p)
	}
	k.attachProgram = func(fd int, p []unix.SockFilter) error {
		if m.turn("setsockopt of a program") {
			return meddle().err
		}
		return base.attachProgram(fd, p)
	}
	k.detachProgram = func(fd int) error {
		if m.turn("setsockopt of a program") {
			return meddle().err
		}
		return base.detachProgram(fd)
	}
	k.unixSocket = func() (int, error) {
		if m.turn("socket of a probe") {
			return -1, meddle().err
		}
		return base.unixSocket()
	}
	k.clientSocket = func(at unix.Sockaddr, ttl int, deaf bool) (int, uint16, error) {
		if m.turn("client of a question") {
			return -1, 0, meddle().err
		}
		return base.clientSocket(at, ttl, deaf)
	}
	k.connect = func(fd int, to unix.Sockaddr) error {
		if m.turn("connect") {
			return meddle().err
		}
		return base.connect(fd, to)
	}
	k.disconnect = func(fd int, at unix.Sockaddr) error {
		if m.turn("connect") {
			return meddle().err
		}
		return base.disconnect(fd, at)
	}
	k.reserve = func(fd int, name string) error {
		if m.turn("bind of a name") {
			return meddle().err
		}
		return base.reserve(fd, name)
	}
	k.namespaceFile = func(fd int) (*os.File, error) {
		if m.turn("ioctl") {
			return nil, meddle().err
		}
		return base.namespaceFile(fd)
	}
	k.descriptors = func() (map[uint64]int, error) {
		if m.turn("descriptors") {
			return nil, meddle().err
		}
		return base.descriptors()
	}
	k.diag = func(request []byte) (diagAnswer, error) {
		if m.turn("sock_diag") {
			if err := meddle().err; err != nil {
				return diagAnswer{}, err
			}
			return listing(meddle().rows...)(request)
		}
		return base.diag(request)
	}
	k.readFile = func(name string) ([]byte, error) {
		if m.turn("read") {
			return meddle().text, meddle().err
		}
		return base.readFile(name)
	}
}

// kernelActs are drains with the filter and with the minimum TTL, of a socket with and
// without another holder.
func kernelActs() (acts []act) {
	stops := map[string]kernel{"filter": realKernel, "minimum TTL": withoutFilter()}
	for _, name := range slices.Sorted(maps.Keys(stops)) {
		if name == "filter" && !mayFilter() {
			continue
		}
		for _, host := range []string{"127.0.0.1", "::1"} {
			if aFreeAddress("tcp", host) == "" {
				continue
			}
			base := stops[name]
			// The real answer takes the kernel a millisecond, and all other tests use it.
			base.diag = listing()
			acts = append(acts, drainedAlone(name, host, base), drainedShared(name, host, base))
		}
	}
	return append(acts, acceptedStopped(), queueTimed(), waitingListed())
}

// queueTimed calls QueueTime of an accepted connection.
func queueTimed() act {
	return act{
		name: "QueueTime", op: "queuetime", base: realKernel, fatal: []string{"getsockopt, of bytes"},
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
			h := holdQueue(t, k, 1)
			require.NoError(t, h.ln.SetDeadline(time.Now().Add(patience)))
			s, err := h.ln.Accept()
			require.NoError(t, err)
			do := func() error {
				d, err := k.queueTime(s)
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
	return on("Waiting", "waiting", []string{"getsockopt", "getsockopt, of a proxy", "sock_diag"}, func(t *testing.T, _ *kernel, ln *Listener) error {
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
	return realKernel.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]}) == nil
}

// drainBriefly drains with a timeout that is long enough for two looks.
func drainBriefly(ln *Listener) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	return ln.Drain(ctx)
}

// drainedAlone drains an empty queue.
func drainedAlone(stop, host string, base kernel) act {
	return act{
		name: "Drain by " + stop + " on " + host, op: "drain", base: base,
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
			ln, err := k.listenWith(t.Context(), "tcp", net.JoinHostPort(host, "0"), nil)
			require.NoError(t, err)
			return func() error { return drainBriefly(ln) }, func(error) error {
				return errors.Join(ln.Close(), freeNow(ln.Addr().String()))
			}
		},
	}
}

// drainedShared drains a queue with clients, on a shared socket. At the end the stop is
// lifted, so that clients can reach the other holder.
func drainedShared(stop, host string, base kernel) act {
	return act{
		name: "Drain by " + stop + " of a shared queue on " + host, op: "drain", base: base,
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
			ln, err := k.listenWith(t.Context(), "tcp", net.JoinHostPort(host, "0"), []Option{WithBacklog(8)})
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
			ln.intake.markShared()
			return func() error { return drainBriefly(ln) }, func(err error) error {
				if op := new(net.OpError); errors.As(err, &op) {
					ln.intake.markShared() // a stop that could not be lifted is lifted at the next call
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
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
			h := holdQueue(t, k, 0)
			require.NoError(t, h.ln.Drain(within(t, patience)))
			d := net.Dialer{Timeout: patience, Control: control255}
			c, err := d.Dial("tcp", h.ln.Addr().String())
			require.NoError(t, err)
			c.SetDeadline(time.Now().Add(patience))
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
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, maxTTL) })
	return errors.Join(cerr, err)
}
