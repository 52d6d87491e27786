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

// aRow is one handshake, as sock_diag lists it.
func aRow() []byte {
	row := make([]byte, diagMsgSize)
	row[diagFamily] = unix.AF_INET
	return row
}

// scripted is a kernel whose answers about handshakes follow a script: rows[i] is the
// answer to look i, and the last one stays.
func scripted(looks *atomic.Int64, rows ...[][]byte) kernel {
	k := withoutFilter()
	k.diag = func(context.Context, []byte) ([][]byte, error) {
		i := looks.Add(1) - 1
		return rows[min(int(i), len(rows)-1)], nil
	}
	return k
}

// A SYN that another processor was about to take in when the intake stopped shows at
// the second look only.
func TestDrainLooksTwiceForHandshakes(t *testing.T) {
	var looks atomic.Int64
	k := scripted(&looks, nil, [][]byte{aRow()})
	ln := listen4(t, k)
	err := ln.Drain(within(t, 200*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.InFlight)

	// What comes at the third look began after the drain.
	looks.Store(0)
	k = scripted(&looks, nil, nil, [][]byte{aRow()})
	ln = listen4(t, k)
	require.NoError(t, ln.Drain(within(t, patience)))
}

// One look is not enough to say that nobody is in flight, also when ctx ends after it.
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

// The kernel takes a handshake out of its table a moment before it puts the connection
// into the queue: a single look between the two would see nobody.
func TestDrainLooksAgainWhenAHandshakeHasEnded(t *testing.T) {
	var looks, queueReads atomic.Int64
	k := scripted(&looks, [][]byte{aRow()}, [][]byte{aRow()}, nil)
	read := k.getsockopt
	k.getsockopt = func(fd, level, name int, p []byte) (int, error) {
		n, err := read(fd, level, name, p)
		if name == unix.TCP_INFO && looks.Load() > 2 && queueReads.Add(1) > 1 {
			binary.NativeEndian.PutUint32(p[infoUnacked:], 1) // it is in the queue by now
		}
		return n, err
	}
	ln := listen4(t, k)
	err := ln.Drain(within(t, 300*time.Millisecond))
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, 1, de.Queued)
	require.Greater(t, looks.Load(), int64(2), "the script was played")
}

// A connection may be made, and accepted, right after the stop is put on the socket:
// what it inherits is known before.
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

// The kernel walks its whole table of sockets for each look. Shards share the looks.
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

// A look that takes long is given up when ctx ends.
func TestDrainAbandonsASlowLook(t *testing.T) {
	k := withoutFilter()
	k.diag = func(ctx context.Context, _ []byte) ([][]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	s, err := k.shards(t.Context(), "tcp4", "127.0.0.1:0", 8, nil)
	require.NoError(t, err)
	defer s.Close()
	err = s.Drain(within(t, 50*time.Millisecond))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	var de *DrainError
	require.ErrorAs(t, err, &de)
	require.Equal(t, DrainError{InFlight: unknown, HeldBack: unknown, err: context.DeadlineExceeded}, *de)
}

// The clients of one address are of one family; of the wildcard they may be of both.
func TestFamilies(t *testing.T) {
	for address, want := range map[string][]uint8{
		"127.0.0.1":        {unix.AF_INET},
		"::1":              {unix.AF_INET6},
		"0.0.0.0":          {unix.AF_INET},
		"::":               {unix.AF_INET, unix.AF_INET6},
		"::ffff:127.0.0.1": {unix.AF_INET, unix.AF_INET6}, // a socket of IPv6, whose clients are of IPv4
	} {
		ip := netip.MustParseAddr(address)
		require.Equal(t, want, families(&net.TCPAddr{IP: ip.AsSlice()}), address)
	}
	require.Equal(t, []uint8{unix.AF_INET, unix.AF_INET6}, families(&net.TCPAddr{}))
}

// The drain of some shards ends well and that of others does not: all of it is told.
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
		f, err := s.listeners[2].File()
		require.NoError(t, err)
		defer f.Close()

		c, err := net.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		queuedBecomes(t, 1, s.Stats)
		err = s.Drain(within(t, 50*time.Millisecond))
		requireDrainOp(t, err)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, unix.ENOMEM, "the third shard still keeps its clients out")
		var de *DrainError
		require.ErrorAs(t, err, &de)
		require.Equal(t, 1, de.Queued)

		require.ErrorIs(t, s.Resume(), unix.ENOMEM)
		fails = false
		require.NoError(t, s.Resume())
		for l := range s.All() {
			require.Equal(t, way{0, 0, -1}, wayOf(t, l.raw))
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
		require.Equal(t, v4, wayOf(t, s.listeners[0].raw), "the others keep theirs out")
		require.Equal(t, way{0, 0, -1}, wayOf(t, s.listeners[2].raw))
	})
}
