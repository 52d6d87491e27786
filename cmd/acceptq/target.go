package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/acceptq/acceptq"
)

// A target is the address that the user has named. Without an IP address it is every address
// of the port.
type target struct {
	addr netip.Addr // invalid if the user gave a port only
	port uint16
}

// parseTarget parses 8080, :8080, 127.0.0.1:8080, localhost:8080 or [::1]:8080.
func parseTarget(text string) (target, error) {
	host, port := "", text
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		host, port = text[:i], text[i+1:]
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return target{}, fmt.Errorf("address %q: the port must be a number from 1 to 65535: %w", text, errUsage)
	}
	at := target{port: uint16(n)}
	switch host {
	case "", "*":
		return at, nil
	case "localhost":
		host = "127.0.0.1"
	}
	if inner, bracket := strings.CutPrefix(host, "["); bracket {
		host = strings.TrimSuffix(inner, "]")
	}
	if at.addr, err = netip.ParseAddr(host); err != nil {
		return target{}, fmt.Errorf("address %q: %q is not an IP address: %w", text, host, errUsage)
	}
	at.addr = at.addr.Unmap()
	return at, nil
}

func (t target) String() string {
	if !t.addr.IsValid() {
		return ":" + strconv.Itoa(int(t.port))
	}
	return netip.AddrPortFrom(t.addr, t.port).String()
}

// takes reports whether a listener gets clients of the target, or keeps another program from
// listening there.
func (t target) takes(q acceptq.Queue) bool {
	return q.Addr.Port() == t.port && (!t.addr.IsValid() || overlap(q.Addr.Addr(), q.V6Only, t.addr))
}

// overlap reports whether a socket that is bound to a has the address b, or b is all
// addresses and includes a. Without v6only the IPv6 wildcard includes all IPv4 addresses.
func overlap(a netip.Addr, v6only bool, b netip.Addr) bool {
	if a.Zone() != "" && b.Zone() != "" && a.Zone() != b.Zone() {
		return false
	}
	a, b = a.WithZone(""), b.WithZone("")
	includes := func(wild, addr netip.Addr, v6only bool) bool {
		return wild.IsUnspecified() && (wild.Is4() == addr.Is4() || wild.Is6() && !v6only)
	}
	return a == b || includes(a, b, v6only) || includes(b, a, false)
}
