package e2e

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
)

// The library reads the release in a jail, and returns an error only for releases whose
// kernel does not spread connections over the sockets of a jail.
func TestReleaseDecidesInAJail(t *testing.T) {
	ep := endpoint.Endpoint{Network: "tcp4", At: netip.MustParseAddrPort("127.0.0.1:80")}
	for release, refused := range map[uint32]bool{500800: true, 500899: true, 500900: false, 600400: false} {
		k := sys.Real
		k.Sysctl = func(name string) (uint32, error) {
			if name == sockopt.ReleaseKnob {
				return release, nil
			}
			return 1, nil // in a jail, and the group is enabled
		}
		err := sockopt.Spreads(&k, ep)
		require.Equal(t, refused, errors.Is(err, errors.ErrUnsupported), "%d: %v", release, err)
	}
}
