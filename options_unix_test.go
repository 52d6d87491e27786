//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

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
