//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Which kernels spread connections over which listeners.
func TestRefusedGroups(t *testing.T) {
	var (
		loopback4 = endpoint{network: "tcp4", at: netip.MustParseAddrPort("127.0.0.1:80")}
		loopback6 = endpoint{network: "tcp6", v6only: true, at: netip.MustParseAddrPort("[::1]:80")}
		all4      = endpoint{network: "tcp4"}
		all6      = endpoint{network: "tcp6", v6only: true}
		both      = endpoint{network: "tcp6"}
	)
	for _, row := range []struct {
		name  string
		facts groupFacts
		ep    endpoint
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
		{"a jail of an unknown release", groupFacts{goos: "freebsd", release: unknown, jailed: true}, loopback4, "FreeBSD unknown"},
		{"DragonFly", groupFacts{goos: "dragonfly"}, loopback4, ""},
		{"DragonFly, IPv6", groupFacts{goos: "dragonfly"}, loopback6, "listen on tcp4"},
		{"DragonFly, a jail", groupFacts{goos: "dragonfly", jailed: true}, loopback4, "jail"},
		{"DragonFly, turned off", groupFacts{goos: "dragonfly", off: true}, loopback4, "sysctl net.inet.tcp.reuseport_ext=1"},
	} {
		if why := row.facts.refusal(row.ep); row.why == "" {
			require.Empty(t, why, row.name)
		} else {
			require.Contains(t, why, row.why, row.name)
		}
	}
}

func TestReleasesThatIgnoreFilters(t *testing.T) {
	for release, ignored := range map[int]bool{
		unknown: false, 1204000: false, 1302001: false, 1305000: false, 1400081: false,
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

func TestCappedLength(t *testing.T) {
	for _, row := range []struct{ n, most, want int }{
		{0, 32, 0}, {1, 32, 1}, {31, 32, 31}, {32, 32, unknown}, {33, 32, unknown},
		{0, 0, 0}, {500, 0, 500}, {500, -1, 500}, {500, math.MaxInt32, 500}, {0, 1, 0}, {1, 1, unknown},
	} {
		require.Equal(t, row.want, cappedLength(row.n, row.most), "%+v", row)
	}
	require.NotContains(t, Stats{Queued: cappedLength(32, 32), Capacity: 129}.String(), "%", "no part of an unknown length")
}

func TestSysctlNumber(t *testing.T) {
	word := binary.NativeEndian.AppendUint32(nil, 1400507)
	for name, row := range map[string]struct {
		raw  []byte
		want uint32
		ok   bool
	}{
		"four bytes":     {word, 1400507, true},
		"one byte, true": {[]byte{1}, 1, true},
		"one byte":       {[]byte{0}, 0, true},
		"nothing":        {nil, 0, false},
		"two bytes":      {[]byte{1, 0}, 0, false},
		"eight bytes":    {make([]byte, 8), 0, false},
	} {
		n, ok := sysctlNumber(row.raw)
		require.Equal(t, row.ok, ok, name)
		require.Equal(t, row.want, n, name)
	}
}

func TestSysctlCount(t *testing.T) {
	for _, tt := range []struct {
		rule string
		n    uint32
		want int
	}{
		{"zero is a number", 0, 0},
		{"a number is kept", 128, 128},
		{"FreeBSD's highest is kept", math.MaxUint32 / 3, 1431655765},
		{"the largest int is kept", math.MaxInt32, math.MaxInt32},
		{"what an int cannot hold is the largest", math.MaxInt32 + 1, math.MaxInt32},
		{"a negative int is never -1, which is unknown", math.MaxUint32, math.MaxInt32},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			require.Equal(t, tt.want, sysctlCount(tt.n))
		})
	}
}

func TestFastOpenFits(t *testing.T) {
	for _, row := range []struct {
		goos        string
		qlen, limit int
		fits        bool
	}{
		{"freebsd", 5, 10, true}, {"freebsd", 5, 11, true}, {"freebsd", 5, 9, false}, {"freebsd", 5, 4, false},
		{"freebsd", 0, 0, true}, {"freebsd", 5, unknown, true}, {"freebsd", math.MaxInt, 128, false},
		{"linux", 5, 4, true},
	} {
		err := fastOpenFits(row.goos, row.qlen, row.limit)
		if row.fits {
			require.NoError(t, err, "%+v", row)
			continue
		}
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", row)
		require.ErrorContains(t, err, fmt.Sprintf("WithFastOpen(%d): granted %d", row.qlen, row.limit/2))
	}
}

// Where the kernel does not answer SO_ACCEPTCONN, a socket that cannot be listening
// is refused all the same.
func TestWhatMaySeemListening(t *testing.T) {
	look := func(sys *system, c syscall.Conn) (err error) {
		raw, rawErr := c.SyscallConn()
		require.NoError(t, rawErr)
		require.NoError(t, raw.Control(func(fd uintptr) { err = sys.mustSeemListening(int(fd)) }))
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client := connect(t, "tcp", ln.Addr().String())
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	require.NoError(t, err)
	defer local.Close()

	require.NoError(t, look(&realSystem, ln.(syscall.Conn)))
	for name, c := range map[string]any{
		"the client's end": client, "the server's end": server, "a UDP socket": udp, "a unix listener": local,
	} {
		require.ErrorIs(t, look(&realSystem, c.(syscall.Conn)), errNotListening, name)
	}

	for call, meddle := range map[string]func(sys *system){
		"getsockopt":  func(sys *system) { sys.getsockoptInt = func(int, int, int) (int, error) { return 0, unix.ENOBUFS } },
		"getsockname": func(sys *system) { sys.getsockname = func(int) (unix.Sockaddr, error) { return nil, unix.ENOBUFS } },
		"getpeername": func(sys *system) { sys.getpeername = func(int) (unix.Sockaddr, error) { return nil, unix.ENOBUFS } },
	} {
		sys := realSystem
		meddle(&sys)
		err := look(&sys, ln.(syscall.Conn))
		require.ErrorIs(t, err, unix.ENOBUFS)
		require.ErrorContains(t, err, call)
	}
}

// The system's own value of keep-alive that net would take for "not given" is an
// error and not net's default.
func TestKeepAliveTooShortToSetAgain(t *testing.T) {
	if _, timed := keepAliveNames(); !timed {
		t.Skip("this system has no times of keep-alive")
	}
	sys := realSystem
	sys.getsockoptInt = func(int, int, int) (int, error) { return 0, nil }
	for _, config := range []net.KeepAliveConfig{
		{Enable: true, Idle: -1}, {Enable: true, Interval: -1}, {Enable: true, Count: -1},
	} {
		_, err := sys.tryKeepAlive(endpoint{network: "tcp4"}, &config)
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", config)
		require.ErrorContains(t, err, "WithKeepAlive")
	}
}
