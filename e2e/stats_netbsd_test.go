package e2e

import (
	"errors"
	"net"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// A queue overflows. If clients connect one at a time, one more than the limit fits.
// More fit in a burst, which this test does not cover.
func TestOverflowOfNetBSD(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, b := range []int{0, 1, 2, 5, 10, 128} {
			if testing.Short() && b > 2 {
				continue
			}
			t.Run(host+" "+strconv.Itoa(b), func(t *testing.T) {
				ln, err := acceptq.ListenTCP(net.JoinHostPort(host, "0"), acceptq.WithBacklog(b))
				if errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Skipf("lo0 has no %s here: give it one with ifconfig(8)", host)
				}
				require.NoError(t, err)
				defer ln.Close()
				var clients []net.Conn
				for len(clients) < b+1 {
					clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()))
					queuedBecomes(t, len(clients), ln.Stats)
				}
				connectHangs(t, ln)

				want := acceptq.Stats{Queued: b + 1, Incomplete: sys.Unknown, Limit: b, Capacity: b + 1, Drops: sys.Unknown}
				s, err := ln.Stats()
				require.NoError(t, err)
				require.Equal(t, want, s)
				require.Equal(t, b+1, queuedNow(t, ln))
				part, known := s.Utilization()
				require.True(t, known)
				require.Equal(t, 1.0, part)
				want.Limit, want.Capacity = sys.Unknown, sys.Unknown // no socket option reports them
				s, err = acceptq.ReadStats(ln.TCPListener())
				require.NoError(t, err)
				require.Equal(t, want, s)

				for left := len(clients); left > 0; left-- {
					queuedBecomes(t, left, ln.Stats)
					testkit.AcceptAndExchange(t, ln, clients)
				}
				queuedBecomes(t, 0, ln.Stats)
			})
		}
	}
}

// If the kernel refuses the call, the result is an error and not a number.
func TestKqueueOfNoListener(t *testing.T) {
	before := testkit.OpenDescriptors()
	n, err := sys.Readable(-1)
	require.ErrorIs(t, err, unix.EBADF)
	require.Equal(t, sys.Unknown, n)
	require.Equal(t, before, testkit.OpenDescriptors())
}
