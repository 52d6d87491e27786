package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/testkit"
)

// asked describes the effect of a list of Options, by another implementation of the
// same rules.
type asked struct {
	opts      []acceptq.Option
	backlog   int
	strict    bool
	reusePort bool
	hooks     int
	called    int
	deferred  time.Duration
	receive   int
	send      int
	fastOpen  int
	keepAlive *net.KeepAliveConfig
	nonsense  bool // an option is invalid, or invalid on Linux
}

// decode makes Options from bytes. A byte chooses an option, and its numbers follow.
func decode(p []byte) *asked {
	a := &asked{backlog: -1}
	number := func() int {
		v, n := binary.Varint(p)
		if n <= 0 {
			p = nil
			return 0
		}
		p = p[n:]
		return int(v)
	}
	positive := func(n int) int {
		a.nonsense = a.nonsense || n <= 0
		return n
	}
	for len(p) > 0 && len(a.opts) < 20 {
		op := p[0]
		p = p[1:]
		var opt acceptq.Option
		switch op % 10 {
		case 0:
			a.backlog = number()
			opt = acceptq.WithBacklog(a.backlog)
		case 1:
			a.strict = true
			opt = acceptq.WithStrictBacklog()
		case 2:
			a.reusePort = true
			opt = acceptq.WithReusePort()
		case 3:
			a.hooks++
			opt = acceptq.WithControl(func(_, _ string, c syscall.RawConn) error {
				a.called++
				return c.Control(func(uintptr) {})
			})
		case 4:
			a.deferred = time.Duration(positive(number()))
			opt = acceptq.WithDeferAccept(a.deferred)
		case 5:
			a.receive = positive(number())
			opt = acceptq.WithReceiveBuffer(a.receive)
		case 6:
			a.send = positive(number())
			opt = acceptq.WithSendBuffer(a.send)
		case 7:
			a.fastOpen = positive(number())
			opt = acceptq.WithFastOpen(a.fastOpen)
		case 8:
			config := net.KeepAliveConfig{
				Enable: op&64 == 0, Idle: time.Duration(number()), Interval: time.Duration(number()), Count: number(),
			}
			a.keepAlive = &config
			a.nonsense = a.nonsense || max(config.Idle, config.Interval) > math.MaxInt32*time.Second || int64(config.Count) > math.MaxInt32
			opt = acceptq.WithKeepAlive(config)
		case 9:
			a.nonsense = a.nonsense || op/10%4 > 0 // a nil Option is ignored
			opt = []acceptq.Option{nil, acceptq.WithControl(nil), acceptq.WithAcceptFilter("dataready", ""), acceptq.WithAcceptFilter("", "x")}[op/10%4]
		}
		a.opts = append(a.opts, opt)
	}
	return a
}

// explains returns nil if the options explain err, and otherwise an error.
func (a *asked) explains(err error, ceiling int) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "listen" {
		return fmt.Errorf("%T: %w", err, err)
	}
	var clamp *acceptq.ClampError
	switch {
	case a.nonsense:
	case errors.As(err, &clamp):
		if !a.strict || a.backlog <= ceiling || clamp.Requested != a.backlog || clamp.Limit != ceiling {
			return fmt.Errorf("asked for %d: %w", a.backlog, err)
		}
	case errors.Is(err, errors.ErrUnsupported):
		if a.fastOpen == 0 && a.receive <= 1<<15 && a.send <= 1<<15 && a.deferred <= time.Hour {
			return fmt.Errorf("nothing is too much: %w", err)
		}
	case a.keepAlive != nil && a.keepAlive.Enable && errors.Is(err, unix.EINVAL): // more than the kernel accepts
		if k := a.keepAlive; max(k.Idle, k.Interval) <= math.MaxInt16*time.Second && k.Count <= 127 {
			return fmt.Errorf("%+v: %w", *k, err)
		}
	default:
		return err
	}
	return nil
}

// For any options, listening either fails with an error that explains accepts and
// leaves nothing behind, or the kernel reports the value of each option and a client is
// served.
func FuzzOptions(f *testing.F) {
	varints := func(op byte, numbers ...int64) (p []byte) {
		p = []byte{op}
		for _, n := range numbers {
			p = binary.AppendVarint(p, n)
		}
		return p
	}
	join := func(parts ...[]byte) (p []byte) {
		for _, part := range parts {
			p = append(p, part...)
		}
		return p
	}
	f.Add([]byte(nil))
	for _, n := range []int64{-1, 0, 1, 5, 4096, math.MaxInt32, math.MaxInt32 + 1, math.MaxInt64, math.MinInt64} {
		f.Add(varints(0, n))
		f.Add(join(varints(0, n), varints(1)))
		f.Add(varints(4, n))
		f.Add(varints(5, n))
		f.Add(varints(6, n))
		f.Add(varints(7, n))
		f.Add(varints(8, n, 1, 1))
		f.Add(varints(8, -1, n, n))
		f.Add(varints(78, n, n, n))
	}
	f.Add(join(varints(0, 7), varints(1), varints(2), varints(3), varints(4, 1e10), varints(5, 50_000), varints(6, 60_000), varints(8, 33e9, -1, 5)))
	f.Add(join(varints(0, 7), varints(3), varints(0, 9), varints(3), varints(4, 1e9), varints(4, 2e9)))
	for _, op := range []byte{9, 19, 29, 39} {
		f.Add([]byte{op})
		f.Add([]byte{2, op, 3})
	}
	b, err := acceptq.ReadSystem()
	require.NoError(f, err)
	testkit.FreeNow("127.0.0.1:0") // net looks at the families once

	f.Fuzz(func(t *testing.T, p []byte) {
		a := decode(p)
		descriptor := testkit.FreeDescriptor()
		ln, err := acceptq.ListenTCP("127.0.0.1:0", a.opts...)
		if err != nil {
			require.Nil(t, ln)
			require.NoError(t, a.explains(err, b.Ceiling))
			require.Equal(t, descriptor, testkit.FreeDescriptor())
			return
		}
		defer ln.Close()
		require.False(t, a.nonsense)
		limit := a.backlog
		if limit < 0 || limit > b.Ceiling {
			limit = b.Ceiling
		}
		require.Equal(t, acceptq.Backlog{
			Requested: max(a.backlog, -1), Ceiling: b.Ceiling, Limit: limit, Effective: limit, Capacity: limit + 1, Measured: true,
		}, ln.Backlog())
		require.EqualValues(t, limit, testkit.TCPInfo(t, ln.TCPListener()).Sacked)
		if a.strict {
			require.LessOrEqual(t, a.backlog, b.Ceiling)
		}
		of := func(c syscall.Conn, level, name int) int {
			return testkit.Option(t, c, testkit.SocketOption{Level: level, Name: name})
		}
		l := ln.TCPListener()
		require.Equal(t, sockopt.BoolInt(a.reusePort), of(l, unix.SOL_SOCKET, unix.SO_REUSEPORT))
		require.Equal(t, a.hooks, a.called)
		require.GreaterOrEqual(t, time.Duration(of(l, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT))*time.Second, a.deferred)
		require.Equal(t, a.deferred > 0, of(l, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT) > 0)
		require.GreaterOrEqual(t, of(l, unix.SOL_SOCKET, unix.SO_RCVBUF)/2, a.receive)
		require.GreaterOrEqual(t, of(l, unix.SOL_SOCKET, unix.SO_SNDBUF)/2, a.send)
		if a.fastOpen > 0 {
			require.Equal(t, a.fastOpen, of(l, unix.IPPROTO_TCP, unix.TCP_FASTOPEN))
		}

		c, err := net.DialTimeout("tcp", "127.0.0.1:"+strconv.Itoa(ln.Addr().(*net.TCPAddr).Port), testkit.Patience)
		require.NoError(t, err)
		defer c.Close()
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		require.NoError(t, ln.SetDeadline(time.Now().Add(testkit.Patience)))
		s, err := ln.AcceptTCP()
		require.NoError(t, err)
		defer s.Close()
		p = make([]byte, 1)
		_, err = s.Read(p)
		require.NoError(t, err)
		require.Equal(t, "x", string(p))

		on, idle, count := 1, 15*time.Second, 9
		if k := a.keepAlive; k != nil {
			on = sockopt.BoolInt(k.Enable)
			if k.Idle > 0 {
				idle = k.Idle
			}
			if k.Count > 0 {
				count = k.Count
			}
			if !k.Enable || k.Idle < 0 || k.Count < 0 {
				idle, count = 0, 0 // the system's
			}
		}
		require.Equal(t, on, of(s, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
		if idle > 0 {
			require.Equal(t, int((idle+time.Second-1)/time.Second), of(s, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE))
			require.Equal(t, count, of(s, unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
		}
	})
}
