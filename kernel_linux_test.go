package acceptq

import (
	"fmt"
	"math"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// The account, the kernel's own word and what really fits are one, for every
// ceiling and every request.
func TestAccountIsTheKernels(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		requests := []int{math.MinInt, -1, 0, 1, 2, 127, 128, 129, 4096, 65536, 196602, math.MaxInt32, math.MaxInt}
		if strconv.IntSize == 64 {
			one := 1
			requests = append(requests, one<<32, one<<32+1) // 0 and 1 in the 32 bits of listen(2)
		}
		for _, ceiling := range []int{1, 3, 128, 4096, 196602} {
			setSysctl(t, "net.core.somaxconn", ceiling)
			for _, n := range requests {
				t.Run(fmt.Sprintf("somaxconn %d, request %d", ceiling, n), func(t *testing.T) {
					ln, err := ListenTCP("127.0.0.1:0", WithBacklog(n))
					require.NoError(t, err)
					defer ln.Close()

					want := n
					if n < 0 || n > ceiling {
						want = ceiling
					}
					require.Equal(t, Backlog{
						Requested: max(n, -1), Ceiling: ceiling, Limit: want,
						Effective: want, Capacity: want + 1, Measured: true,
					}, ln.Backlog())
					require.Equal(t, want, ln.EffectiveBacklog())
					require.Equal(t, n > ceiling, ln.Backlog().Clamped())

					if want <= 3 {
						require.Len(t, connectUntilFull(t, ln.Addr(), want+10), want+1, "what really fits")
						require.Equal(t, want+1, kernelQueue(t, ln.Addr()))
					}
				})
			}
		}
	})
}
