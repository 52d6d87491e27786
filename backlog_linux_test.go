package acceptq

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"net"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestStrict(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 3)

		for name, opts := range map[string][]Option{
			"less than the ceiling":         {WithBacklog(2)},
			"the ceiling":                   {WithBacklog(3)},
			"nothing":                       {WithBacklog(0)},
			"the maximum":                   {WithBacklog(-1)},
			"the maximum, the smallest int": {WithBacklog(math.MinInt)},
			"no WithBacklog":                nil,
		} {
			t.Run("granted: "+name, func(t *testing.T) {
				ln, err := ListenTCP("127.0.0.1:0", append(opts, WithStrictBacklog())...)
				require.NoError(t, err)
				require.NoError(t, ln.Close())
			})
		}

		const command = "sysctl -w net.core.somaxconn=4"
		for _, tc := range []struct {
			rule    string
			ceiling func(k *sys.Calls)
			said    int
			raise   string // "" if the command would lower the ceiling
			bound   bool   // refused because of the limit on the socket
		}{
			{rule: "before bind where the ceiling can be read", ceiling: func(*sys.Calls) {}, said: 3, raise: command},
			{rule: "by the socket where it is hidden", ceiling: hidden["ENOENT"], said: -1, raise: command, bound: true},
			{rule: "by the socket where it lies", ceiling: ceilingFile("1000\n", nil), said: 1000, bound: true},
		} {
			t.Run("refused "+tc.rule, func(t *testing.T) {
				k := sys.Real
				tc.ceiling(&k)
				var bound string
				k.Bind = noteBound(t, &bound)
				err := testkit.Refused(t, func() (*Listener, error) {
					return listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(4), WithStrictBacklog()})
				})
				var clamp *ClampError
				require.ErrorAs(t, err, &clamp)
				require.Equal(t, &ClampError{
					Requested: 4, Limit: 3, Ceiling: tc.said,
					Knob: "net.core.somaxconn", Raise: tc.raise,
				}, clamp)
				require.Equal(t, tc.bound, bound != "")
				if tc.bound {
					testkit.FreeAgain(t, "tcp", bound)
				}
			})
		}

		t.Run("the port is never reachable", func(t *testing.T) {
			holder := ourMaker.Open(t, "tcp", "127.0.0.1:0")
			address := holder.Addr().String()
			err := testkit.Refused(t, func() (*Listener, error) {
				return ListenTCP(address, WithStrictBacklog(), WithBacklog(4))
			})
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.NotErrorIs(t, err, unix.EADDRINUSE)
		})
	})
}

// With WithStrictBacklog, SetBacklog changes nothing if the kernel would grant less.
func TestStrictSetBacklogKeepsTheLimit(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 16)
		const command = "sysctl -w net.core.somaxconn=17"
		keeps := func(t *testing.T, ln *Listener, ceiling int, raise string) {
			t.Helper()
			before := ln.Backlog()
			b, err := ln.SetBacklog(17)
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.Equal(t, ClampError{
				Requested: 17, Limit: 16, Ceiling: ceiling,
				Knob: "net.core.somaxconn", Raise: raise,
			}, *clamp)
			testkit.RequireOp(t, err, "listen")
			require.Equal(t, before, b)
			require.Equal(t, before, ln.Backlog())
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, before.Limit, s.Limit, "the limit of the kernel")
		}
		listen := func(t *testing.T, k *sys.Calls, n int) *Listener {
			t.Helper()
			ln, err := listenWith(k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(n), WithStrictBacklog()})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			return ln
		}
		t.Run("by prediction", func(t *testing.T) {
			calls := 0
			k := sys.Real
			k.Listen = func(fd, n int) error { calls++; return sys.Real.Listen(fd, n) }
			ln := listen(t, &k, 8)
			calls = 0
			keeps(t, ln, 16, command)
			require.Zero(t, calls, "listen(2) must not be called")
			b, err := ln.SetBacklog(16)
			require.NoError(t, err)
			require.Equal(t, 16, b.Limit)
			keeps(t, ln, 16, command)
			b, err = ln.SetBacklog(-1)
			require.NoError(t, err, "a request for the maximum is never clamped")
			require.Equal(t, 16, b.Limit)
		})
		// listen(2) cannot be undone: a ceiling that was lowered in the meantime would
		// shorten the queue for good.
		t.Run("the ceiling cannot be read", func(t *testing.T) {
			defer testkit.SetSysctl(t, "net.core.somaxconn", 16)
			testkit.SetSysctl(t, "net.core.somaxconn", 1000)
			k := sys.Real
			ln := listen(t, &k, 1000)
			for _, ceiling := range []int{100, 1000, 2000} {
				testkit.SetSysctl(t, "net.core.somaxconn", ceiling)
				k.ReadFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
				for _, n := range []int{1001, 1000, 5} {
					b, err := ln.SetBacklog(n)
					testkit.RequireOp(t, err, "listen")
					require.ErrorIs(t, err, errors.ErrUnsupported)
					require.ErrorIs(t, err, fs.ErrPermission)
					require.Equal(t, Backlog{Requested: 1000, Ceiling: unknown, Limit: 1000, Effective: 1000, Capacity: 1001, Measured: true}, b)
					require.Equal(t, b, ln.Backlog())
					s, err := ReadStats(ln.TCPListener())
					require.NoError(t, err)
					require.Equal(t, 1000, s.Limit, "the limit of the kernel")
				}
			}
			b, err := ln.SetBacklog(-1)
			require.NoError(t, err, "a request for the maximum is never clamped")
			require.Equal(t, 2000, b.Limit)
		})
		t.Run("a wrong number in the file", func(t *testing.T) {
			k := sys.Real
			k.ReadFile = func(string) ([]byte, error) { return []byte("4096\n"), nil }
			ln := listen(t, &k, 8)
			b, err := ln.SetBacklog(17)
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.Equal(t, ClampError{Requested: 17, Limit: 16, Ceiling: 4096, Knob: "net.core.somaxconn"}, *clamp)
			require.Equal(t, Backlog{Requested: 17, Ceiling: 4096, Limit: 16, Effective: 16, Capacity: 17, Measured: true}, b)
			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, 16, s.Limit, "Backlog must report the real limit")
		})
		t.Run("nothing can be read after listening", func(t *testing.T) {
			k := sys.Real
			ln := listen(t, &k, 8)
			before := ln.EffectiveBacklog()
			k.ReadFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
			k.Getsockopt = func(int, int, int, []byte) (int, error) { return 0, syscall.EPERM }
			b, err := ln.SetBacklog(16)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			require.Equal(t, before, b.Limit)
			s, err := ReadStats(ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, before, s.Limit, "the limit of the kernel")
		})
		t.Run("the limit cannot be read", func(t *testing.T) {
			k := sys.Real
			ln := listen(t, &k, 8)
			k.Getsockopt = func(int, int, int, []byte) (int, error) { return 0, syscall.EPERM }
			b, err := ln.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 16, Limit: 9, Effective: 9, Capacity: 10}, b, "by prediction")
		})
	})
}

// If the ceiling cannot be read, it is unknown and the error names the file. Listening
// still works.
func TestCeilingUnreadable(t *testing.T) {
	for _, tt := range []struct {
		rule string
		text string
		err  error // of reading the file
		want error
	}{
		{"no file", "", &fs.PathError{Op: "open", Path: "/proc/sys/net/core/somaxconn", Err: fs.ErrNotExist}, fs.ErrNotExist},
		{"no number in it", "many\n", nil, strconv.ErrSyntax},
		{"a number out of range", "-1\n", nil, strconv.ErrRange},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			k := sys.Real
			k.ReadFile = func(string) ([]byte, error) { return []byte(tt.text), tt.err }
			predicted, err := predict(&k, 100)
			require.ErrorIs(t, err, tt.want)
			require.ErrorContains(t, err, "/proc/sys/net/core/somaxconn")
			require.Equal(t, Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, predicted)

			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: unknown, Limit: 1, Effective: 1, Capacity: 2, Measured: true}, ln.Backlog())
		})
	}
}

// Each number that cannot be read is unknown. This is not an error.
func TestReadSystemWithoutFiles(t *testing.T) {
	whole := map[string]string{
		"/proc/sys/net/core/somaxconn":             "4096\n",
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   "2048\n",
		"/proc/sys/net/ipv4/tcp_syncookies":        "1\n",
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": "0\n",
		"/proc/sys/net/ipv4/tcp_migrate_req":       "1\n",
		"/proc/thread-self/net/netstat": "TcpExt: SyncookiesSent ListenOverflows ListenDrops TCPReqQFullDoCookies TCPReqQFullDrop\n" +
			"TcpExt: 9 11 12 13 14\n",
	}
	all := System{
		Ceiling: 4096, Knob: "net.core.somaxconn", SYNBacklog: 2048, SYNCookies: 1, AbortOnOverflow: 0, MigrateRequests: 1,
		ListenOverflows: 11, ListenDrops: 12, ReqQFullDrop: 14, ReqQFullDoCookies: 13,
	}
	without := map[string]func(*System){
		"":                                         func(*System) {},
		"/proc/sys/net/core/somaxconn":             func(s *System) { s.Ceiling = unknown },
		"/proc/sys/net/ipv4/tcp_max_syn_backlog":   func(s *System) { s.SYNBacklog = unknown },
		"/proc/sys/net/ipv4/tcp_syncookies":        func(s *System) { s.SYNCookies = unknown },
		"/proc/sys/net/ipv4/tcp_abort_on_overflow": func(s *System) { s.AbortOnOverflow = unknown },
		"/proc/sys/net/ipv4/tcp_migrate_req":       func(s *System) { s.MigrateRequests = unknown },
		"/proc/thread-self/net/netstat": func(s *System) {
			s.ListenOverflows, s.ListenDrops, s.ReqQFullDrop, s.ReqQFullDoCookies = unknown, unknown, unknown, unknown
		},
	}
	for missing, forget := range without {
		for _, garbage := range []string{"", "\n", "-1\n", "many\n"} {
			k := sys.Real
			k.ReadFile = func(name string) ([]byte, error) {
				text, ok := whole[name]
				switch {
				case !ok:
					t.Errorf("an unexpected file: %s", name)
					return nil, fs.ErrNotExist
				case name != missing:
					return []byte(text), nil
				case garbage == "":
					return nil, fs.ErrPermission
				}
				return []byte(garbage), nil
			}
			want := all
			forget(&want)
			got, err := readSystem(&k)
			require.NoError(t, err)
			require.Equal(t, want, got, "without %q, %q instead", missing, garbage)
		}
	}
	k := sys.Real
	k.ReadFile = func(string) ([]byte, error) { return nil, fs.ErrNotExist }
	want := all
	for _, forget := range without {
		forget(&want)
	}
	got, err := readSystem(&k)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// The advice names the place where the ceiling must be changed: a container's ceiling is
// not the host's, and some users may not change it.
func TestAdviceNamesThePlace(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 128)
		advice := func() string {
			_, err := ListenTCP("127.0.0.1:0", WithBacklog(4096), WithStrictBacklog())
			require.ErrorAs(t, err, new(*ClampError))
			ln, lerr := ListenTCP("127.0.0.1:0", WithBacklog(4096))
			require.NoError(t, lerr)
			defer ln.Close()
			require.Contains(t, err.Error(), "sysctl -w net.core.somaxconn=4096"+ceilingPlace())
			return ln.Backlog().String()
		}
		require.Contains(t, advice(), "to raise it, sysctl -w net.core.somaxconn=4096 in this network namespace (docs/ceiling.md), then SetBacklog(4096) or a restart")
		require.NoError(t, unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""))
		require.NoError(t, unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		require.Contains(t, advice(), " for this network namespace, where the program itself may not do it (docs/ceiling.md), then")
	})
}

// gVisor answers TCP_INFO with zeros. Older kernels return a shorter answer or an error. In
// all these cases the queue is unknown, not 0.
func TestQueueThatCannotBeRead(t *testing.T) {
	answers := map[string]func(p []byte) (int, error){
		"zeros":   func(p []byte) (int, error) { clear(p); return len(p), nil },
		"too few": func(p []byte) (int, error) { p[0] = tcpinfo.Listen; return tcpinfo.QueueEnd - 1, nil },
		"refused": func([]byte) (int, error) { return 0, unix.EOPNOTSUPP },
		"another state": func(p []byte) (int, error) {
			p[tcpinfo.State] = 1
			binary.NativeEndian.PutUint32(p[tcpinfo.Unacked:], 7)
			return len(p), nil
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			k := sys.Real
			k.Getsockopt = func(fd, level, option int, p []byte) (int, error) {
				if level == unix.IPPROTO_TCP && option == unix.TCP_INFO {
					return answer(p)
				}
				return sys.Real.Getsockopt(fd, level, option, p)
			}
			k.ReadFile = func(string) ([]byte, error) { return []byte("128\n"), nil }
			ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
			require.NoError(t, err)
			t.Cleanup(func() { ln.Close() })
			require.Equal(t, Backlog{Requested: 5, Ceiling: 128, Limit: 5, Effective: 5, Capacity: 6}, ln.Backlog())
			testkit.Connect(t, "tcp", ln.Addr().String())

			s, err := ln.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: 5, Capacity: 6}, s, "the limit and capacity come from Backlog")
			_, known := s.Utilization()
			require.False(t, known)

			w, err := wrap(&k, ln.TCPListener())
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: -1, Ceiling: 128, Limit: unknown, Effective: unknown, Capacity: unknown}, w.Backlog())
			s, err = w.Stats()
			require.NoError(t, err)
			require.Equal(t, Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown}, s)
			b, err := w.SetBacklog(9)
			require.NoError(t, err)
			require.Equal(t, Backlog{Requested: 9, Ceiling: 128, Limit: 9, Effective: 9, Capacity: 10}, b, "the numbers follow the rule")

			require.NoError(t, ln.Close())
			_, err = w.Stats()
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

// The numbers of the kernel are unsigned with 32 bits. They must not overflow an int of 32
// bits.
func TestConnectionsSaturate(t *testing.T) {
	for _, n := range []uint32{0, 1, 4096, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		want := min(uint64(n), math.MaxInt)
		require.EqualValues(t, want, connections(binary.NativeEndian.AppendUint32(nil, n)), "%d", n)
	}
}

// Drops are a kernel counter of 32 bits, and unknown if the kernel does not report it.
func TestDropsThatCannotBeRead(t *testing.T) {
	for name, row := range map[string]struct {
		answer func(p []byte) (int, error)
		want   int64
	}{
		"refused": {func([]byte) (int, error) { return 0, unix.ENOPROTOOPT }, unknown},
		"too few": {func(p []byte) (int, error) { return sys.MemInfoEnd - 1, nil }, unknown},
		"the largest": {func(p []byte) (int, error) {
			binary.NativeEndian.PutUint32(p[sys.MemInfoDrops:], math.MaxUint32)
			return sys.MemInfoEnd, nil
		}, math.MaxUint32},
	} {
		k := sys.Real
		k.Getsockopt = func(fd, level, option int, p []byte) (int, error) {
			if level == unix.SOL_SOCKET && option == unix.SO_MEMINFO {
				return row.answer(p)
			}
			return sys.Real.Getsockopt(fd, level, option, p)
		}
		ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		s, err := ln.Stats()
		require.NoError(t, err)
		require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: row.want}, s, name)
	}
}

// If the protocol of a socket cannot be read, its drops are unknown and all else is known.
func TestProtocolThatCannotBeRead(t *testing.T) {
	ln := listenForStats(t, WithBacklog(5))
	k := sys.Real
	k.GetsockoptInt = func(fd, level, option int) (int, error) {
		if level == unix.SOL_SOCKET && option == unix.SO_PROTOCOL {
			return 0, unix.ENOPROTOOPT
		}
		return sys.Real.GetsockoptInt(fd, level, option)
	}
	w, err := wrap(&k, ln.TCPListener())
	require.NoError(t, err)
	s, err := w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: unknown}, s)

	k.GetsockoptInt = sys.Real.GetsockoptInt // the protocol is read again
	s, err = w.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 5, Capacity: 6, Drops: 0}, s)
}

// Stats of a listener makes two system calls. The limit is that of the socket, even if
// another holder has changed it.
func TestStatsAsksTheSocket(t *testing.T) {
	k := sys.Real
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(5)})
	require.NoError(t, err)
	defer ln.Close()
	another := mustWrap(t, ln.TCPListener())
	_, err = another.SetBacklog(3)
	require.NoError(t, err)

	calls := 0
	k.Getsockopt = func(fd, level, name int, p []byte) (int, error) {
		calls++
		return sys.Real.Getsockopt(fd, level, name, p)
	}
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		calls++
		return sys.Real.GetsockoptInt(fd, level, name)
	}
	s, err := ln.Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{Incomplete: unknown, Limit: 3, Capacity: 4, Drops: 0}, s)
	require.Equal(t, 2, calls)
}
