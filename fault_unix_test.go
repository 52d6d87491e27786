//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Each call of listening fails in turn, with every errno that it may give.
func TestEveryCallOfListeningMayFail(t *testing.T) {
	ofOption := func(level, name int) func(sys *system, errno unix.Errno) {
		return func(sys *system, errno unix.Errno) {
			sys.setsockoptInt = func(fd, l, n, value int) error {
				if l == level && n == name {
					return errno
				}
				return realSystem.setsockoptInt(fd, l, n, value)
			}
		}
	}
	refusals := []unix.Errno{unix.EINVAL, unix.ENOPROTOOPT, unix.EPERM, unix.ENOMEM}
	type fault struct {
		name, network, address string
		call                   string // as the error must name it
		errnos                 []unix.Errno
		breaks                 func(sys *system, errno unix.Errno)
		opts                   []Option
	}
	faults := []fault{
		{
			name: "socket", network: "tcp", address: "127.0.0.1:0", call: "socket",
			errnos: []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT},
			breaks: func(sys *system, errno unix.Errno) {
				sys.socket = func(int) (int, error) { return -1, errno }
			},
		},
		{
			name: "what net made of all addresses", network: "tcp6", address: ":0", call: "getsockopt", errnos: refusals,
			breaks: func(sys *system, errno unix.Errno) {
				sys.getsockoptInt = func(int, int, int) (int, error) { return 0, errno }
				sys.wildcards = new(sync.Map) // net is asked again
			},
		},
		{
			name: "IPV6_V6ONLY", network: "tcp6", address: "[::1]:0", call: "setsockopt", errnos: refusals,
			breaks: ofOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY),
		},
		{
			name: "SO_REUSEADDR", network: "tcp", address: "127.0.0.1:0", call: "setsockopt", errnos: refusals,
			breaks: ofOption(unix.SOL_SOCKET, unix.SO_REUSEADDR),
		},
		{
			name: "bind", network: "tcp", address: "127.0.0.1:0", call: "bind",
			errnos: []unix.Errno{unix.EADDRINUSE, unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOBUFS},
			breaks: func(sys *system, errno unix.Errno) {
				sys.bind = func(int, unix.Sockaddr) error { return errno }
			},
		},
		{
			name: "listen", network: "tcp", address: "127.0.0.1:0", call: "listen",
			errnos: []unix.Errno{unix.EADDRINUSE, unix.EACCES, unix.EPERM, unix.EINVAL, unix.EOPNOTSUPP, unix.ENOBUFS},
			breaks: func(sys *system, errno unix.Errno) {
				sys.listenCall = func(int, int) error { return errno }
			},
		},
		{
			name: "adoption by net", network: "tcp", address: "127.0.0.1:0", call: "fcntl",
			errnos: []unix.Errno{unix.EMFILE, unix.EINVAL},
			breaks: func(sys *system, errno unix.Errno) {
				sys.adopt = func(*os.File) (net.Listener, error) {
					return nil, &net.OpError{Op: "file", Net: "file+net", Err: os.NewSyscallError("fcntl", errno)}
				}
			},
		},
	}
	if name, err := reusePort(); err == nil {
		faults = append(faults, fault{
			name: "SO_REUSEPORT", network: "tcp", address: "127.0.0.1:0", call: "setsockopt", errnos: refusals,
			breaks: ofOption(unix.SOL_SOCKET, name), opts: []Option{WithReusePort()},
		})
	}

	for _, f := range faults {
		for _, errno := range f.errnos {
			t.Run(f.name+"/"+unix.ErrnoName(errno), func(t *testing.T) {
				if ln, err := net.Listen(f.network, f.address); err != nil {
					t.Skipf("net cannot here: %v", err)
				} else {
					ln.Close()
				}
				sys := realSystem
				var bound string
				sys.bind = noteBound(t, &bound)
				f.breaks(&sys, errno)
				err := refused(t, func() (*Listener, error) {
					return sys.listenWith(t.Context(), f.network, f.address, f.opts)
				})
				require.ErrorIs(t, err, errno)
				requireLayers(t, err, f.network, f.call)
				if bound != "" {
					freeAgain(t, f.network, bound)
				}
			})
		}
	}
}

// noteBound binds, and says to what.
func noteBound(t *testing.T, bound *string) func(fd int, sa unix.Sockaddr) error {
	return func(fd int, sa unix.Sockaddr) error {
		if err := realSystem.bind(fd, sa); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		require.NoError(t, err)
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			*bound = (&net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}).String()
		case *unix.SockaddrInet6:
			*bound = (&net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}).String()
		}
		return nil
	}
}

// requireLayers checks that err is an OpError with the network and an address,
// over a SyscallError of the call, over an errno.
func requireLayers(t *testing.T, err error, network, call string) {
	t.Helper()
	op, ok := err.(*net.OpError)
	require.True(t, ok, "%T", err)
	require.Equal(t, network, op.Net)
	require.NotNil(t, op.Addr)
	sysErr, ok := op.Err.(*os.SyscallError)
	require.True(t, ok, "%T", op.Err)
	require.Equal(t, call, sysErr.Syscall)
	require.IsType(t, unix.Errno(0), sysErr.Err)
}

func TestErrnosOfTheKernelCanBeTold(t *testing.T) {
	holder := ourMaker.open(t, "tcp", "127.0.0.1:0")
	err := refused(t, func() (*Listener, error) { return ListenTCP(holder.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	requireLayers(t, err, "tcp", "bind")

	err = refused(t, func() (*Listener, error) { return ListenTCP("192.0.2.1:0") })
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	requireLayers(t, err, "tcp", "bind")
}

// net ignores a zone that does not exist where the kernel does not look at it;
// a listener in the wrong place is worse than none.
func TestAZoneThatDoesNotExistIsRefused(t *testing.T) {
	ln, err := net.Listen("tcp", "[::1%nosuch]:0")
	if err != nil {
		t.Skipf("net cannot here: %v", err)
	}
	require.NoError(t, ln.Close())
	for _, address := range []string{"[::1%nosuch]:0", "[2001:db8::1%nosuch]:0"} {
		err := refused(t, func() (*Listener, error) { return ListenTCP(address) })
		var addrErr *net.AddrError
		require.ErrorAs(t, err, &addrErr)
		require.Equal(t, address, addrErr.Addr)
	}
}

func TestAHookThatDoesNotReturnLeavesNothing(t *testing.T) {
	descriptors := openDescriptors()
	var bound string
	sys := realSystem
	sys.bind = noteBound(t, &bound)
	leave := func(how func()) {
		done := make(chan any)
		go func() {
			defer func() { done <- recover() }()
			_, _ = sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{
				WithControl(func(_, _ string, c syscall.RawConn) error {
					return c.Control(func(uintptr) { how() })
				}),
			})
		}()
		<-done
	}
	leave(func() { panic("the hook's own") })
	leave(runtime.Goexit)
	require.Empty(t, bound)
	require.Equal(t, descriptors, openDescriptors())
}

func TestAHookMayNotKeepTheSocket(t *testing.T) {
	var kept syscall.RawConn
	ln, err := ListenTCP("127.0.0.1:0", WithControl(func(_, _ string, c syscall.RawConn) error {
		kept = c
		return nil
	}))
	require.NoError(t, err)
	defer ln.Close()
	require.Error(t, kept.Control(func(uintptr) { t.Error("called on a closed file") }))
}

// One port for several, and only with the option.
func TestReusePort(t *testing.T) {
	name, err := reusePort()
	if err != nil {
		err := refused(t, func() (*Listener, error) { return ListenTCP("127.0.0.1:0", WithReusePort()) })
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	o := socketOption{unix.SOL_SOCKET, name}
	plain := ourMaker.open(t, "tcp", "127.0.0.1:0")
	require.Zero(t, option(t, plain, o))

	first := maker{listen: listenOurs(WithReusePort())}.open(t, "tcp", "127.0.0.1:0")
	second := maker{listen: listenOurs(WithReusePort())}.open(t, "tcp", first.Addr().String())
	require.NotZero(t, option(t, first, o))
	require.Equal(t, first.Addr(), second.Addr())
	err = refused(t, func() (*Listener, error) { return ListenTCP(first.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE, "every socket of the address needs it")
}
