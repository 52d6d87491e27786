//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package testkit

import (
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// OpenDescriptors counts the open descriptors of this process. It checks only low
// numbers, because the kernel always uses the lowest free one.
func OpenDescriptors() (n int) {
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}

// A SocketOption is an option of getsockopt(2) whose value is a number.
type SocketOption struct{ Level, Name int }

// Option reads o from the socket of c.
func Option(t *testing.T, c syscall.Conn, o SocketOption) int {
	t.Helper()
	return OnDescriptor(t, c, func(fd int) (int, error) { return unix.GetsockoptInt(fd, o.Level, o.Name) })
}

func OnDescriptor(t testing.TB, c syscall.Conn, f func(fd int) (int, error)) (v int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(fd uintptr) { v, err = f(int(fd)) })
	require.NoError(t, cerr)
	require.NoError(t, os.NewSyscallError("getsockopt", err))
	return v
}

func Dial(t *testing.T, addr net.Addr) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	c, err := d.Dial(addr.Network(), addr.String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// AcceptBy accepts one connection with a method of ln.
func AcceptBy(t *testing.T, ln interface{ SetDeadline(time.Time) error }, method func() (net.Conn, error)) *net.TCPConn {
	t.Helper()
	require.NoError(t, ln.SetDeadline(time.Now().Add(10*time.Second)))
	c, err := method()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// Eventually waits up to 10 seconds for a change in the kernel.
func Eventually(done func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); !done(); <-tick.C {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// FreeDescriptor returns the number of the next descriptor. A leaked descriptor
// increases it, and one that is closed twice can decrease it.
func FreeDescriptor() int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err == nil {
		unix.Close(fd)
	}
	return fd
}

// FreeNow reports whether the address is free.
func FreeNow(address string) error {
	var err error
	if Eventually(func() bool {
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

// AFreeAddress returns a free address on host, or "" if there is no such host.
func AFreeAddress(network, host string) string {
	ln, err := net.Listen(network, net.JoinHostPort(host, "0"))
	if err != nil {
		return ""
	}
	defer ln.Close()
	return ln.Addr().String()
}
