//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int{
		math.MinInt64: -1, -time.Second: -1, -1: -1, 0: 0, 1: 1, time.Second: 1, time.Second + 1: 2,
		math.MaxInt32 * time.Second: math.MaxInt32, math.MaxInt64: math.MaxInt32,
	} {
		require.Equal(t, want, seconds(d), "%v", d)
	}
}
