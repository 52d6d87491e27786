//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// testOptionFaults fails each system call of listening with opts in turn. Whichever
// it is, listening fails with its name and errno, and leaves no descriptor and no
// address behind.
func testOptionFaults(t *testing.T, base system, host string, opts []Option) {
	first, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Logf("%s: %v", host, err) // no IPv6, say
		return
	}
	address := first.Addr().String()
	require.NoError(t, first.Close())

	for _, fault := range []struct {
		call string
		put  func(sys *system, turn func() error)
	}{
		{"setsockopt", func(sys *system, turn func() error) {
			sys.setsockoptInt = func(fd, level, name, value int) error {
				if err := turn(); err != nil {
					return err
				}
				return base.setsockoptInt(fd, level, name, value)
			}
		}},
		{"getsockopt", func(sys *system, turn func() error) {
			sys.getsockoptInt = func(fd, level, name int) (int, error) {
				if name == 0x1011 { // SO_LISTENQLIMIT of FreeBSD, which can be done without
					return base.getsockoptInt(fd, level, name)
				}
				if err := turn(); err != nil {
					return 0, err
				}
				return base.getsockoptInt(fd, level, name)
			}
		}},
		{"socket", func(sys *system, turn func() error) {
			sys.socket = func(domain int) (int, error) {
				if err := turn(); err != nil {
					return -1, err
				}
				return base.socket(domain)
			}
		}},
	} {
		for _, errno := range []unix.Errno{unix.EINVAL, unix.ENOPROTOOPT, unix.ENOBUFS, unix.EPERM} {
			// k is the call that fails, until there are fewer than that.
			for k, more := 1, true; more; k++ {
				t.Run(fmt.Sprintf("%s, %s %d, %v", host, fault.call, k, errno), func(t *testing.T) {
					before := openDescriptors()
					sys, calls := base, 0
					fault.put(&sys, func() error {
						if calls++; calls == k {
							return errno
						}
						return nil
					})
					ln, err := sys.listenWith(t.Context(), "tcp", address, opts)
					if more = calls >= k; !more {
						require.NoError(t, err)
						ln.Close()
						require.Greater(t, k, 1, "nothing has failed")
						return
					}
					require.ErrorIs(t, err, errno)
					require.Nil(t, ln)
					var op *net.OpError
					require.ErrorAs(t, err, &op)
					require.Equal(t, "listen", op.Op)
					require.Equal(t, address, op.Addr.String())
					var call *os.SyscallError
					require.ErrorAs(t, err, &call)
					require.Equal(t, fault.call, call.Syscall)
					require.Equal(t, before, openDescriptors())

					again, err := net.Listen("tcp", address)
					require.NoError(t, err, "the address must be free")
					again.Close()
				})
			}
		}
	}
}

// A hook that fails, or panics, leaves nothing behind; those after it are not called.
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

// listen listens until the test ends.
func listen(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func dial(t *testing.T, addr net.Addr) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	c, err := d.Dial(addr.Network(), addr.String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// acceptBy takes one connection, by a method of ln.
func acceptBy(t *testing.T, ln interface{ SetDeadline(time.Time) error }, method func() (net.Conn, error)) *net.TCPConn {
	t.Helper()
	require.NoError(t, ln.SetDeadline(time.Now().Add(10*time.Second)))
	c, err := method()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// eventually waits for what the kernel is about to do, at most 10 seconds.
func eventually(done func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); !done(); <-tick.C {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}
