package acceptq

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// aRow returns one handshake of a listener at 127.0.0.1 in the format of sock_diag.
func aRow() []byte {
	row := make([]byte, diagMsgSize)
	row[diagFamily] = unix.AF_INET
	copy(row[diagSource:], []byte{127, 0, 0, 1})
	return row
}

// scripted returns a kernel whose listings of handshakes follow a script: rows[i] is
// the answer to look i, and the last answer is repeated.
func scripted(looks *atomic.Int64, rows ...[][]byte) kernel {
	k := withoutFilter()
	k.diag = func(request []byte) (diagAnswer, error) {
		i := looks.Add(1) - 1
		return listing(rows[min(int(i), len(rows)-1)]...)(request)
	}
	return k
}

// Another processor may still be handling a SYN when the drain starts to drop SYNs. Its
// handshake shows only at the second look.
func TestDrainLooksTwiceForHandshakes(t *testing.T) {
	var looks atomic.Int64
	k := scripted(&looks, nil, [][]byte{aRow()})
	ln := listen4(t, k)
	err := ln.Drain(within(t, 200*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.InFlight)

	// A handshake that first shows at the third look began after the drain.
	looks.Store(0)
	k = scripted(&looks, nil, nil, [][]byte{aRow()})
	ln = listen4(t, k)
	require.NoError(t, ln.Drain(within(t, patience)))
}

// One look is not enough to conclude that no handshake is in flight, even if ctx ends
// after it.
func TestDrainIsNotSureAfterOneLook(t *testing.T) {
	var looks atomic.Int64
	k := scripted(&looks, nil)
	ctx, cancel := context.WithCancel(t.Context())
	read := k.getsockopt
	k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		if looks.Load() == 1 {
			cancel()
		}
		return read(fd, level, name, p)
	}
	ln := listen4(t, k)
	err := ln.Drain(ctx)
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, unknown, de.InFlight)
	require.EqualValues(t, 1, looks.Load())
}

// The kernel removes a handshake from its table a moment before it puts the connection
// into the queue. A single look between the two would see neither.
func TestDrainLooksAgainWhenAHandshakeHasEnded(t *testing.T) {
	var looks, queueReads atomic.Int64
	k := scripted(&looks, [][]byte{aRow()}, [][]byte{aRow()}, nil)
	read := k.getsockopt
	k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		n, err := read(fd, level, name, p)
		if name == unix.TCP_INFO && looks.Load() > 2 && queueReads.Add(1) > 1 {
			binary.NativeEndian.PutUint32(p[infoUnacked:], 1) // the connection is in the queue now
		}
		return n, err
	}
	ln := listen4(t, k)
	err := ln.Drain(within(t, 300*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.Queued)
	require.Greater(t, looks.Load(), int64(2), "the drain must have made all looks of the script")
}

// A connection can be made and accepted right after the drain has set an option on the
// socket. So the drain records before that what connections will inherit.
func TestInheritanceIsRecordedBeforeTheStop(t *testing.T) {
	var ln *Listener
	noted := false
	k := realKernel
	k.attachFilter = func(int, *unix.SockFprog) error {
		in := ln.intake.inherited.Load()
		require.NotNil(t, in)
		require.True(t, in.stop.filter)
		return unix.EPERM
	}
	k.setsockoptInt = func(fd, level, name, value int) error {
		if value == maxTTL {
			in := ln.intake.inherited.Load()
			require.NotNil(t, in)
			require.False(t, in.stop.filter)
			noted = true
		}
		return unix.SetsockoptInt(fd, level, name, value)
	}
	ln = listen4(t, k)
	require.NoError(t, ln.Drain(within(t, patience)))
	require.True(t, noted)
}

// The kernel walks its whole table of sockets for each look, so shards share the looks.
func TestShardsShareTheLooksOfADrain(t *testing.T) {
	of := func(n int) int64 {
		var looks atomic.Int64
		k := scripted(&looks, nil)
		s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", n, nil)
		require.NoError(t, err)
		defer s.Close()
		require.NoError(t, s.Drain(within(t, patience)))
		return looks.Load()
	}
	require.EqualValues(t, 2, of(1), "a listener of one address has clients of one family")
	require.EqualValues(t, 2, of(64))
}

// When ctx ends, a drain abandons a slow look.
func TestDrainAbandonsASlowLook(t *testing.T) {
	k := withoutFilter()
	k.diag = answered(func([]byte) (int, error) {
		<-time.After(time.Millisecond)
		return 0, unix.EAGAIN
	})
	s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 8, nil)
	require.NoError(t, err)
	defer s.Close()
	err = s.Drain(within(t, 50*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, DrainError{InFlight: unknown, HeldBack: unknown, err: context.DeadlineExceeded}, *de)
}

// The clients of a single address belong to one family. Those of the wildcard can
// belong to both.
func TestFamilies(t *testing.T) {
	for address, want := range map[string][]uint8{
		"127.0.0.1":        {unix.AF_INET},
		"::1":              {unix.AF_INET6},
		"0.0.0.0":          {unix.AF_INET},
		"::":               {unix.AF_INET, unix.AF_INET6},
		"::ffff:127.0.0.1": {unix.AF_INET, unix.AF_INET6}, // an IPv6 socket whose clients use IPv4
	} {
		ip := netip.MustParseAddr(address)
		require.Equal(t, want, families(&net.TCPAddr{IP: ip.AsSlice()}), address)
	}
	require.Equal(t, []uint8{unix.AF_INET, unix.AF_INET6}, families(&net.TCPAddr{}))
}

// The drain of some shards succeeds and that of others fails. The error reports all of it.
func TestShardsDrainReportsEveryError(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k kernel, v4 way) {
		fails := true
		set := k.setsockoptInt
		k.setsockoptInt = func(fd, level, name, value int) error {
			if fails && value == 0 {
				return unix.ENOMEM
			}
			return set(fd, level, name, value)
		}
		s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 4, nil)
		require.NoError(t, err)
		defer s.Close()
		f, err := shardsOf(s)[2].File()
		require.NoError(t, err)
		defer f.Close()

		c, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		queuedBecomes(t, 1, s.Stats)
		err = s.Drain(within(t, 50*time.Millisecond))
		requireDrainOp(t, err)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, unix.ENOMEM, "the third shard must still keep clients out")
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 1, de.Queued)

		require.ErrorIs(t, s.Resume(), unix.ENOMEM)
		fails = false
		require.NoError(t, s.Resume())
		for l := range s.All() {
			require.Equal(t, way{0, 0, -1}, wayOf(t, l.intake.raw))
			if stats, err := l.Stats(); err == nil && stats.Queued > 0 {
				got, err := l.Accept()
				require.NoError(t, err)
				defer got.Close()
				require.NoError(t, l.SetDeadline(time.Now()))
				l.Accept()
			}
		}
		err = s.Drain(within(t, patience))
		requireStillOpen(t, err)
		require.Equal(t, v4, wayOf(t, shardsOf(s)[0].intake.raw), "the other shards must keep clients out")
		require.Equal(t, way{0, 0, -1}, wayOf(t, shardsOf(s)[2].intake.raw))
	})
}
