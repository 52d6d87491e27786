package main

import (
	"net/netip"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]string{
		"8080": ":8080", ":8080": ":8080", "*:8080": ":8080", "127.0.0.1:80": "127.0.0.1:80", "[::1]:80": "[::1]:80",
		"::1:80": "[::1]:80", "localhost:80": "127.0.0.1:80", "[::ffff:1.2.3.4]:80": "1.2.3.4:80", "0.0.0.0:80": "0.0.0.0:80",
		"[fe80::1%eth0]:80": "[fe80::1%eth0]:80",
	} {
		at, err := parseTarget(text)
		require.NoError(t, err, text)
		require.Equal(t, want, at.String())
	}
	for _, text := range []string{"", ":", "0", ":0", "65536", "http", "example.com:80", "1.2.3:80", "-1", "127.0.0.1"} {
		_, err := parseTarget(text)
		require.ErrorIs(t, err, errUsage, text)
	}
}

func FuzzParseTarget(f *testing.F) {
	for _, text := range []string{"8080", ":80", "[::1]:80", "127.0.0.1:80", "a:b:c"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		at, err := parseTarget(text)
		if err != nil {
			return
		}
		again, err := parseTarget(at.String())
		if err != nil || again != at {
			t.Fatal(text, at, again, err)
		}
	})
}

// Two addresses overlap if a client can be meant for both.
func TestOverlap(t *testing.T) {
	for _, test := range []struct {
		listener string
		v6only   bool
		target   string
		want     bool
	}{
		{"0.0.0.0", false, "127.0.0.1", true},
		{"127.0.0.1", false, "0.0.0.0", true},
		{"127.0.0.1", false, "127.0.0.2", false},
		{"127.0.0.1", false, "127.0.0.1", true},
		{"::", false, "127.0.0.1", true},
		{"::", true, "127.0.0.1", false},
		{"::", true, "::1", true},
		{"0.0.0.0", false, "::1", false},
		{"0.0.0.0", false, "::", true},
		{"fe80::1%eth0", false, "fe80::1", true},
		{"fe80::1%eth0", false, "fe80::1%eth0", true},
		{"fe80::1%eth0", false, "fe80::1%eth1", false},
	} {
		got := overlap(netip.MustParseAddr(test.listener), test.v6only, netip.MustParseAddr(test.target))
		require.Equal(t, test.want, got, "%+v", test)
	}
	q := acceptq.Queue{Addr: netip.MustParseAddrPort("127.0.0.1:80")}
	require.True(t, target{port: 80}.takes(q))
	require.False(t, target{port: 81}.takes(q))
}
