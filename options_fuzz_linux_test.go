package acceptq

import (
	"encoding/binary"
	"math"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// FuzzOptions takes bytes for a list of options, nine bytes each: which, and a
// number. Either listening fails, in net's shape and with nothing left behind, or
// each option that was given last of its kind holds and a client is served.
func FuzzOptions(f *testing.F) {
	f.Add([]byte{})
	for which := range byte(9) {
		for _, n := range []int64{math.MinInt64, -1, 0, 1, 2, 5000, 1 << 31, 1 << 32, math.MaxInt64} {
			f.Add(binary.BigEndian.AppendUint64([]byte{which}, uint64(n)))
		}
	}
	f.Add(append(binary.BigEndian.AppendUint64([]byte{0}, 5), binary.BigEndian.AppendUint64([]byte{1}, 0)...))
	f.Fuzz(func(t *testing.T, p []byte) {
		var opts []Option
		last := make(map[byte]int64)
		for ; len(p) >= 9 && len(opts) < 16; p = p[9:] {
			n := int64(binary.BigEndian.Uint64(p[1:]))
			which := p[0] % 9
			if which != 3 && which != 7 {
				n = int64(int(n)) // an int may have 32 bits
			}
			last[which] = n
			opts = append(opts, []Option{
				WithBacklog(int(n)),
				WithStrictBacklog(),
				WithReusePort(),
				WithDeferAccept(time.Duration(n)),
				WithFastOpen(int(n)),
				WithReceiveBuffer(int(n)),
				WithSendBuffer(int(n)),
				WithKeepAlive(net.KeepAliveConfig{Enable: n%2 == 0, Idle: time.Duration(n), Count: int(n % 200)}),
				WithAcceptFilter(string(p[1:9]), ""),
			}[which])
		}
		before := openDescriptors()
		ln, err := ListenTCP("127.0.0.1:0", opts...)
		if err != nil {
			require.Nil(t, ln)
			var op *net.OpError
			require.ErrorAs(t, err, &op)
			require.Equal(t, "listen", op.Op)
			require.NotEmpty(t, err.Error())
			require.Equal(t, before, openDescriptors())
			return
		}
		defer ln.Close()

		holds := map[byte]func(n int64) bool{
			0: func(n int64) bool {
				b := ln.Backlog()
				_, strict := last[1]
				return b.Measured && (int64(b.Limit) == n || n < 0 || b.Clamped() && !strict)
			},
			2: func(int64) bool { return option(t, ln, socketOption{unix.SOL_SOCKET, unix.SO_REUSEPORT}) == 1 },
			3: func(n int64) bool {
				got := option(t, ln, socketOption{unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT})
				return time.Duration(got)*time.Second >= time.Duration(n)
			},
			4: func(n int64) bool {
				return int64(option(t, ln, socketOption{unix.IPPROTO_TCP, unix.TCP_FASTOPEN})) == n
			},
			5: func(n int64) bool { return int64(option(t, ln, socketOption{unix.SOL_SOCKET, unix.SO_RCVBUF})) >= 2*n },
			6: func(n int64) bool { return int64(option(t, ln, socketOption{unix.SOL_SOCKET, unix.SO_SNDBUF})) >= 2*n },
		}
		for which, n := range last {
			if holds := holds[which]; holds != nil {
				require.True(t, holds(n), "option %d with %d", which, n)
			}
		}
		require.NotContains(t, last, byte(8), "there are no accept filters here")

		c := acceptOne(t, ln, ln.Accept)
		if n, given := last[7]; given {
			on := option(t, c, socketOption{unix.SOL_SOCKET, unix.SO_KEEPALIVE}) != 0
			require.Equal(t, n%2 == 0, on)
		}
	})
}
