package acceptq

import (
	"encoding/binary"
	"math"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

// gVisor answers TCP_INFO with zeros. Older kernels return a shorter answer or an error. In
// all these cases the queue is unknown, not 0.
func TestQueueThatCannotBeRead(t *testing.T) {
	answers := map[string]func(p []byte) (int, error){
		"zeros":   func(p []byte) (int, error) { clear(p); return len(p), nil },
		"too few": func(p []byte) (int, error) { p[0] = tcpinfo.Listen; return tcpinfo.QueueEnd - 1, nil },
		"refused": func([]byte) (int, error) { return 0, unix.EOPNOTSUPP },
		"another state": func(p []byte) (int, error) {
			p[tcpinfo.State] = 1
			binary.NativeEndian.PutUint32(p[tcpinfo.Unacked:], 7)
			return len(p), nil
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			k.Getsockopt = func(fd, level, option int, p []byte) (int, error) {
				if level == unix.IPPROTO_TCP && option == unix.TCP_INFO {
					return answer(p)
				}
				return sys.Real.Getsockopt(fd, level, option, p)
			}
			k.ReadFile = func(string) ([]byte, error) { return []byte("128\n"), nil }
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			require.Equal(t, Backlog{Requested: 5, Ceiling: 128, Limit: 5, Effective: 5, Capacity: 6}, ln.Backlog())
			testkit.Connect(t, "tcp", ln.Addr().String())

			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: 5, Capacity: 6}, s, "the limit and capacity come from Backlog")
			_, known := s.Utilization()
			require.False(t, known)

			w, err := wrap(&k, ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: -1, Ceiling: 128, Limit: unknown, Effective: unknown, Capacity: unknown}, w.Backlog())
			s, err = w.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown}, s)
			b, err := w.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 128, Limit: 9, Effective: 9, Capacity: 10}, b, "the numbers follow the rule")

			require.NoError(t, ln.Close())
			_, err = w.Stats()
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

// The numbers of the kernel are unsigned with 32 bits. They must not overflow an int of 32
// bits.
func TestConnectionsSaturate(t *testing.T) {
	for _, n := range []uint32{0, 1, 4096, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		want := min(uint64(n), math.MaxInt)
		require.EqualValues(t, want, connections(binary.NativeEndian.AppendUint32(nil, n)), "%d", n)
	}
}

// Drops are a kernel counter of 32 bits, and unknown if the kernel does not report it.
func TestDropsThatCannotBeRead(t *testing.T) {
	for name, row := range map[string]struct {
		answer func(p []byte) (int, error)
		want   int64
	}{
		"refused": {func([]byte) (int, error) { return 0, unix.ENOPROTOOPT }, unknown},
		"too few": {func(p []byte) (int, error) { return sys.MemInfoEnd - 1, nil }, unknown},
		"the largest": {func(p []byte) (int, error) {
			binary.NativeEndian.PutUint32(p[sys.MemInfoDrops:], math.MaxUint32)
			return sys.MemInfoEnd, nil
		}, math.MaxUint32},
	} {
		k := sys.Real
		k.Getsockopt = func(fd, level, option int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && option == unix.SO_MEMINFO {
				return row.answer(p)
			}
			return sys.Real.Getsockopt(fd, level, option, p)
		}
		ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: row.want}, s, name)
	}
}

// If the protocol of a socket cannot be read, its drops are unknown and all else is known.
func TestProtocolThatCannotBeRead(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	k := sys.Real
	k.GetsockoptInt = func(fd, level, option int) (int, error) {
		if level == unix.SOL_SOCKET && option == unix.SO_PROTOCOL {
			return 0, unix.ENOPROTOOPT
		}
		return sys.Real.GetsockoptInt(fd, level, option)
	}
	w, err := wrap(&k, ln.TCPListener())
	require.NoError(t, err)
	s, err := w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: unknown}, s)

	k.GetsockoptInt = sys.Real.GetsockoptInt // the protocol is read again
	s, err = w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: 0}, s)
}

// Stats of a listener makes two system calls. The limit is that of the socket, even if
// another holder has changed it.
func TestStatsAsksTheSocket(t *testing.T) {
	k := sys.Real
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
	require.NoError(t, err)
	defer ln.Close()
	another := mustWrap(t, ln.TCPListener())
	_, err = another.SetBacklog(3)
	require.NoError(t, err)

	calls := 0
	k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
		calls++
		return sys.Real.Getsockopt(fd, level, name, p)
	}
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		calls++
		return sys.Real.GetsockoptInt(fd, level, name)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 3, Capacity: 4, Drops: 0}, s)
	require.Equal(t, 2, calls)
}
