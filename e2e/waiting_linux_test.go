package e2e

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/rawtcp"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The number is that of the SYNs whose handshake has not ended, also on a dual-stack
// listener. It excludes queued connections and the handshakes of another address.
func TestHandshakesInFlight(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		wire, err := rawtcp.Open()
		require.NoError(t, err)
		defer wire.Close()
		for _, address := range []string{"127.0.0.1:0", ":0"} {
			ln, err := acceptq.ListenTCP(address)
			require.NoError(t, err)
			defer ln.Close()
			testkit.Connect(t, "tcp", ln.Addr().String())
			port := netip.MustParseAddrPort(ln.Addr().String()).Port()
			for i := range 7 {
				to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
				require.NoError(t, wire.Send(rawtcp.Segment{From: sender(i), To: to, Seq: 1, Flags: rawtcp.SYN}))
			}
			n, err := ln.Handshakes(t.Context())
			require.NoError(t, err)
			require.Equal(t, 7, n)
			require.Equal(t, testkit.SynReceived(t, ln.Addr()), n)
			if address == "127.0.0.1:0" {
				other, err := acceptq.ListenTCP(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), port).String())
				require.NoError(t, err)
				defer other.Close()
				n, err := other.Handshakes(t.Context())
				require.NoError(t, err)
				require.Zero(t, n, "they belong to another address")
			}
		}
	})
}
