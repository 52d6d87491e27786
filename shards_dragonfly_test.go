package acceptq

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// The library reads the release in a jail, and returns an error only for releases whose
// kernel does not spread connections over the sockets of a jail.
func TestReleaseDecidesInAJail(t *testing.T) {
	ep := endpoint{network: "tcp4", at: netip.MustParseAddrPort("127.0.0.1:80")}
	for release, refused := range map[uint32]bool{500800: true, 500899: true, 500900: false, 600400: false} {
		k := realKernel
		k.sysctl = func(name string) (uint32, error) {
			if name == releaseKnob {
				return release, nil
			}
			return 1, nil // in a jail, and the group is enabled
		}
		err := k.spreads(ep)
		require.Equal(t, refused, errors.Is(err, errors.ErrUnsupported), "%d: %v", release, err)
	}
}
