//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// If a bound cannot be read, the numbers that depend on it are unknown. Listening still
// works.
func TestUnreadableBoundIsUnknown(t *testing.T) {
	r := hostRule()
	for _, name := range []string{r.knob, r.floor} {
		if name == "" {
			continue // compiled in, or absent
		}
		for _, errno := range []unix.Errno{unix.ENOENT, unix.EPERM, unix.EINVAL} {
			t.Run(name+"/"+unix.ErrnoName(errno), func(t *testing.T) {
				k := realKernel
				k.sysctl = func(asked string) (uint32, error) {
					if asked == name || asked == r.formerKnob {
						return 0, errno
					}
					return realKernel.sysctl(asked)
				}
				b, err := k.predict(1)
				require.ErrorIs(t, err, errno)
				require.Equal(t, -1, b.Limit)

				ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
				require.NoError(t, err)
				defer ln.Close()
				want := -1
				if runtime.GOOS == "freebsd" {
					want = 1 // the socket reports the limit
				}
				require.Equal(t, want, ln.Backlog().Limit)
				require.Equal(t, runtime.GOOS == "freebsd", ln.Backlog().Measured)
			})
		}
	}
}

// If a socket does not report its limit, the library computes it by the rule and sets
// Measured to false.
func TestUnreadableLimitFollowsTheRule(t *testing.T) {
	for name, answer := range map[string]struct {
		n   int
		err error
	}{
		"ENOPROTOOPT": {0, unix.ENOPROTOOPT},
		"EPERM":       {0, unix.EPERM},
		"negative":    {-1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			k := realKernel
			k.getsockoptInt = func(int, int, int) (int, error) { return answer.n, answer.err }
			ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			want, err := k.predict(1)
			require.NoError(t, err)
			require.Equal(t, want, ln.Backlog())
		})
	}
}

// optional reports whether listening and Wrap succeed without the option.
func optional(level, name int) bool {
	return level == unix.SOL_SOCKET &&
		(name == soListenQueueLimit || name == unix.SO_ACCEPTCONN && runtime.GOOS == "dragonfly")
}

// statsCalls are the calls that Stats cannot do without.
var statsCalls = []string{"getsockopt", "getsockopt, if it tells", "kevent"}

// willing returns a kernel that accepts every option, even if it does not spread
// connections.
func willing() kernel {
	k := realKernel
	k.sysctl = func(name string) (uint32, error) {
		switch name {
		case "net.inet.tcp.fastopen.server_enable", groupKnob:
			return 1, nil
		case "security.jail.jailed", "jail.jailed":
			return 0, nil
		}
		return realOwnCalls.sysctl(name)
	}
	if runtime.GOOS != "freebsd" {
		return k
	}
	k.setsockoptInt = func(fd, level, name, value int) error {
		if level == unix.IPPROTO_TCP {
			return nil // TCP_FASTOPEN, which the kernel may lack
		}
		return realKernel.setsockoptInt(fd, level, name, value)
	}
	return k
}

func kernelOptions() (opts []Option) {
	opts = []Option{WithBacklog(20)}
	if runtime.GOOS != "openbsd" {
		opts = append(opts, WithKeepAlive(net.KeepAliveConfig{Enable: true}))
	}
	if runtime.GOOS == "freebsd" {
		opts = append(opts, WithFastOpen(3))
	}
	return opts
}

func kernelAnswers(all map[string][]answer) {
	all["sysctl"] = append(refusals(unix.EFAULT, unix.EINVAL, unix.EISDIR, unix.ENOENT, unix.ENOMEM, unix.EPERM),
		numbers(0, 1, -1)...)
	for _, errno := range []unix.Errno{unix.EACCES, unix.EBADF, unix.EINTR, unix.ENOENT, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		all["kevent"] = append(all["kevent"], answer{err: os.NewSyscallError("kevent", errno)})
	}
}

func (m *meddler) ownCalls(k *kernel, base kernel, meddle func() answer) {
	k.sysctl = func(name string) (uint32, error) {
		if m.turn("sysctl") {
			return uint32(meddle().n), meddle().err
		}
		return base.sysctl(name)
	}
	k.readable = func(fd int) (int, error) {
		if m.turn("kevent") {
			return unknown, meddle().err
		}
		return base.readable(fd)
	}
	k.setsockoptString = func(fd, level, name int, value string) error {
		if m.turn("setsockopt") {
			return meddle().err
		}
		return base.setsockoptString(fd, level, name, value)
	}
}

func kernelActs() []act { return nil }
