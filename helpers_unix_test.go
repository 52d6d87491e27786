//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// openDescriptors counts the open descriptors of this process. It checks only low
// numbers, because the kernel always uses the lowest free one.
func openDescriptors() (n int) {
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}

// A socketOption is an option of getsockopt(2) whose value is a number.
type socketOption struct{ level, name int }

// option reads o from the socket of c.
func option(t *testing.T, c syscall.Conn, o socketOption) int {
	t.Helper()
	return onDescriptor(t, c, func(fd int) (int, error) { return unix.GetsockoptInt(fd, o.level, o.name) })
}

func onDescriptor(t testing.TB, c syscall.Conn, f func(fd int) (int, error)) (v int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(fd uintptr) { v, err = f(int(fd)) })
	require.NoError(t, cerr)
	require.NoError(t, os.NewSyscallError("getsockopt", err))
	return v
}

// listen opens a listener that is closed when the test ends.
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

// acceptBy accepts one connection with a method of ln.
func acceptBy(t *testing.T, ln interface{ SetDeadline(time.Time) error }, method func() (net.Conn, error)) *net.TCPConn {
	t.Helper()
	require.NoError(t, ln.SetDeadline(time.Now().Add(10*time.Second)))
	c, err := method()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// eventually waits up to 10 seconds for a change in the kernel.
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

// freeDescriptor returns the number of the next descriptor. A leaked descriptor
// increases it, and one that is closed twice can decrease it.
func freeDescriptor() int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err == nil {
		unix.Close(fd)
	}
	return fd
}

// freeNow reports whether the address is free.
func freeNow(address string) error {
	var err error
	if eventually(func() bool {
		var ln net.Listener
		if ln, err = net.Listen("tcp", address); err == nil {
			ln.Close()
		}
		return err == nil
	}) {
		return nil
	}
	return err
}

// aFreeAddress returns a free address on host, or "" if there is no such host.
func aFreeAddress(network, host string) string {
	ln, err := net.Listen(network, net.JoinHostPort(host, "0"))
	if err != nil {
		return ""
	}
	defer ln.Close()
	return ln.Addr().String()
}

// noteBound binds and records the address.
func noteBound(t *testing.T, bound *string) func(fd int, sa unix.Sockaddr) error {
	return func(fd int, sa unix.Sockaddr) error {
		if err := realKernel.bind(fd, sa); err != nil {
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
