//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

import (
	"math"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// Which kernels spread connections over which listeners.
func TestRefusedGroups(t *testing.T) {
	var (
		loopback4 = endpoint.Endpoint{Network: "tcp4", At: netip.MustParseAddrPort("127.0.0.1:80")}
		loopback6 = endpoint.Endpoint{Network: "tcp6", V6Only: true, At: netip.MustParseAddrPort("[::1]:80")}
		all4      = endpoint.Endpoint{Network: "tcp4"}
		all6      = endpoint.Endpoint{Network: "tcp6", V6Only: true}
		both      = endpoint.Endpoint{Network: "tcp6"}
	)
	for _, row := range []struct {
		name  string
		facts groupFacts
		ep    endpoint.Endpoint
		why   string // a part of the reason; "" if the kernel spreads
	}{
		{"Linux", groupFacts{goos: "linux"}, both, ""},
		{"FreeBSD", groupFacts{goos: "freebsd", release: 1302001}, loopback4, ""},
		{"FreeBSD, IPv6", groupFacts{goos: "freebsd", release: 1302001}, loopback6, ""},
		{"FreeBSD, all addresses of IPv4", groupFacts{goos: "freebsd"}, all4, ""},
		{"FreeBSD, all addresses of IPv6", groupFacts{goos: "freebsd"}, all6, ""},
		{"FreeBSD, all addresses of both", groupFacts{goos: "freebsd"}, both, "listen on tcp4 and on tcp6"},
		{"FreeBSD 15, all addresses of both", groupFacts{goos: "freebsd", release: 1500068}, both, "listen on tcp4 and on tcp6"},
		{"a jail of 12.4", groupFacts{goos: "freebsd", release: 1204000, jailed: true}, loopback4, "jail"},
		{"a jail of 13.2", groupFacts{goos: "freebsd", release: 1302001, jailed: true}, loopback4, "FreeBSD 1302001 (kern.osreldate)"},
		{"a jail of 13.2-STABLE", groupFacts{goos: "freebsd", release: 1302511, jailed: true}, loopback4, "jail"},
		{"a jail of 13.3", groupFacts{goos: "freebsd", release: 1303001, jailed: true}, loopback4, ""},
		{"a jail of 14.0-CURRENT", groupFacts{goos: "freebsd", release: 1400050, jailed: true}, loopback4, "jail"},
		{"a jail of 14.0", groupFacts{goos: "freebsd", release: 1400097, jailed: true}, loopback4, ""},
		{"a jail of 14.0-STABLE", groupFacts{goos: "freebsd", release: 1400507, jailed: true}, loopback4, ""},
		{"a jail of 15.0", groupFacts{goos: "freebsd", release: 1500068, jailed: true}, loopback4, ""},
		{"a jail of an unknown release", groupFacts{goos: "freebsd", release: sys.Unknown, jailed: true}, loopback4, "FreeBSD unknown"},
		{"DragonFly", groupFacts{goos: "dragonfly"}, loopback4, ""},
		{"DragonFly, IPv6", groupFacts{goos: "dragonfly"}, loopback6, "listen on tcp4"},
		{"DragonFly, a jail of an unknown release", groupFacts{goos: "dragonfly", release: sys.Unknown, jailed: true}, loopback4, "DragonFly unknown"},
		{"DragonFly, a jail of 5.8", groupFacts{goos: "dragonfly", release: 500800, jailed: true}, loopback4, "DragonFly 500800 (kern.osreldate)"},
		{"DragonFly, a jail of 5.9", groupFacts{goos: "dragonfly", release: 500900, jailed: true}, loopback4, ""},
		{"DragonFly, a jail of 6.4", groupFacts{goos: "dragonfly", release: 600400, jailed: true}, loopback4, ""},
		{"DragonFly, a jail of 5.9, IPv6", groupFacts{goos: "dragonfly", release: 500901, jailed: true}, loopback6, "listen on tcp4"},
		{"DragonFly, turned off", groupFacts{goos: "dragonfly", off: true}, loopback4, "sysctl net.inet.tcp.reuseport_ext=1"},
	} {
		if why := row.facts.refusal(row.ep); row.why == "" {
			require.Empty(t, why, row.name)
		} else {
			require.Contains(t, why, row.why, row.name)
		}
	}
}

// How many listeners of one address get connections.
func TestMaxGroup(t *testing.T) {
	for goos, most := range map[string]int{
		"freebsd": 256, "dragonfly": 128, "linux": math.MaxInt, "android": math.MaxInt,
	} {
		require.Equal(t, most, MaxGroup(goos), goos)
	}
}

func TestReleasesThatIgnoreFilters(t *testing.T) {
	for release, ignored := range map[int]bool{
		sys.Unknown: false, 1204000: false, 1302001: false, 1305000: false, 1400081: false,
		1400097: true, 1400507: true, 1403000: true, 1500012: true,
		1500068: false, 1501000: false, 1600000: false,
	} {
		require.Equal(t, ignored, filtersIgnored(release), "%d", release)
	}
}

func TestFilterModules(t *testing.T) {
	for _, row := range [][3]string{
		{"freebsd", "dataready", "kldload accf_data"},
		{"freebsd", "httpready", "kldload accf_http"},
		{"freebsd", "dnsready", "kldload accf_dns"},
		{"freebsd", "tlsready", "kldload accf_tls"},
		{"dragonfly", "dataready", "kldload accf_data"},
		{"dragonfly", "dnsready", "no such filter is loaded"},
		{"dragonfly", "tlsready", "no such filter is loaded"},
		{"netbsd", "dataready", "modload accf_dataready"},
		{"netbsd", "httpready", "modload accf_httpready"},
		{"netbsd", "dnsready", "no such filter is loaded"},
		{"freebsd", "nosuchfilter", "no such filter is loaded"},
		{"openbsd", "dataready", "no such filter is loaded"},
	} {
		require.Equal(t, row[2], filterModule(row[0], row[1]), "%v", row)
	}
}

// Which bound a buffer exceeds.
func TestBufferBound(t *testing.T) {
	for _, row := range []struct {
		goos    string
		n, most int
		bound   string
	}{
		{"freebsd", 600_000, 2_097_152, Sbsize},
		{"freebsd", 1_864_135, 2_097_152, Sbsize},
		{"freebsd", 1_864_136, 2_097_152, "8/9 of kern.ipc.maxsockbuf"},
		{"freebsd", 600_000, sys.Unknown, "8/9 of kern.ipc.maxsockbuf"},
		{"netbsd", 209_715, 262_144, Sbsize},
		{"netbsd", 209_716, 262_144, "4/5 of kern.sbmax"},
		{"dragonfly", 419_430, 524_288, Sbsize},
		{"dragonfly", math.MaxInt32, 524_288, "4/5 of kern.ipc.maxsockbuf"},
		{"freebsd", math.MaxInt32, math.MaxInt32, "8/9 of kern.ipc.maxsockbuf"},
		{"openbsd", 3_000_000, sys.Unknown, "the kernel's SB_MAX"},
		{"darwin", 1, sys.Unknown, "kern.ipc.maxsockbuf"},
	} {
		require.Equal(t, row.bound, bufferBound(row.goos, row.n, row.most), "%+v", row)
	}
}

func TestFilters(t *testing.T) {
	named, deferred := &Options{AcceptFilter: &AcceptFilter{Name: "dataready"}}, &Options{DeferAccept: 1}
	for _, goos := range []string{"freebsd", "netbsd", "dragonfly"} {
		require.True(t, Filters(goos, named), goos)
		require.True(t, Filters(goos, deferred), goos)
		require.False(t, Filters(goos, new(Options)), goos)
	}
	require.False(t, Filters("linux", deferred))
}
