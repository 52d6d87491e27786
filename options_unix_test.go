//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"math"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// If a WithControl function fails or panics, nothing is left behind, and later ones are not
// called.
func TestControlFails(t *testing.T) {
	before := openDescriptors()
	for name, fail := range map[string]func() error{
		"error": func() error { return errNoted },
		"panic": func() error { panic(errNoted) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if r := recover(); r != nil {
					require.Equal(t, errNoted, r)
				}
				require.Equal(t, before, openDescriptors())
			}()
			called := 0
			hook := func(next func() error) Option {
				return WithControl(func(string, string, syscall.RawConn) error {
					called++
					return next()
				})
			}
			ok := func() error { return nil }
			ln, err := ListenTCP("127.0.0.1:0", hook(ok), hook(fail), hook(ok))
			require.ErrorIs(t, err, errNoted)
			require.Nil(t, ln)
			require.Equal(t, 2, called)
		})
	}
}

// Keep-alive values are checked on a socket of the same family as the listener, because
// a host may have no other family.
func TestKeepAliveNeedsNoOtherFamily(t *testing.T) {
	if _, timed := keepAliveNames(); !timed {
		t.Skip("this system checks no values")
	}
	for host, family := range map[string]int{"127.0.0.1": unix.AF_INET, "::1": unix.AF_INET6} {
		if aFreeAddress("tcp", host) == "" {
			continue
		}
		k := realKernel
		k.socket = func(domain int) (int, error) {
			if domain != family {
				return -1, unix.EAFNOSUPPORT
			}
			return realKernel.socket(domain)
		}
		ln, err := k.listenWith(t.Context(), "tcp", net.JoinHostPort(host, "0"), []Option{
			WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Minute}),
		})
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	}
}

// A negative field stands for the system's own value. It is an error if the kernel does not
// report that value, as can happen on NetBSD.
func TestKeepAliveValueThatCannotBeRead(t *testing.T) {
	names, timed := keepAliveNames()
	if !timed {
		t.Skip("this system reads no value")
	}
	k := realKernel
	k.getsockoptInt = func(fd, level, name int) (int, error) {
		if level == unix.IPPROTO_TCP && slices.Contains(names[:], name) {
			return 0, unix.ENOPROTOOPT
		}
		return realKernel.getsockoptInt(fd, level, name)
	}
	for _, config := range []net.KeepAliveConfig{{Enable: true, Idle: -1}, {Enable: true, Interval: -1}, {Enable: true, Count: -1}} {
		err := refused(t, func() (*Listener, error) {
			return k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithKeepAlive(config)})
		})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, unix.ENOPROTOOPT)
	}
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Minute})})
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}

// If the kernel refuses a buffer that is too large, as on the BSDs, the error is the
// same as for a clamped buffer.
func TestBufferThatTheKernelRefuses(t *testing.T) {
	k := realKernel
	k.setsockoptInt = func(fd, level, name, value int) error {
		if level == unix.SOL_SOCKET && (name == unix.SO_RCVBUF || name == unix.SO_SNDBUF) {
			return unix.ENOBUFS
		}
		return realKernel.setsockoptInt(fd, level, name, value)
	}
	for _, opt := range []Option{WithReceiveBuffer(8192), WithSendBuffer(8192)} {
		err := refused(t, func() (*Listener, error) { return k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{opt}) })
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, unix.ENOBUFS)
	}
}

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int{
		math.MinInt64: -1, -time.Second: -1, -1: -1, 0: 0, 1: 1, time.Second: 1, time.Second + 1: 2,
		math.MaxInt32 * time.Second: math.MaxInt32, math.MaxInt64: math.MaxInt32,
	} {
		require.Equal(t, want, seconds(d), "%v", d)
	}
}

// If the system's own keep-alive value is so short that net would treat it as "not given",
// listening fails. It does not silently use the default of net.
func TestKeepAliveTooShortToSetAgain(t *testing.T) {
	if _, timed := keepAliveNames(); !timed {
		t.Skip("this system has no times of keep-alive")
	}
	k := realKernel
	k.getsockoptInt = func(int, int, int) (int, error) { return 0, nil }
	for _, config := range []net.KeepAliveConfig{
		{Enable: true, Idle: -1}, {Enable: true, Interval: -1}, {Enable: true, Count: -1},
	} {
		_, err := k.tryKeepAlive(endpoint{network: "tcp4"}, &config)
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", config)
		require.ErrorContains(t, err, "WithKeepAlive")
	}
}
