//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package endpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// An Endpoint is a resolved address to listen on.
type Endpoint struct {
	Network string         // "tcp4" or "tcp6", the socket's family
	At      netip.AddrPort // without a valid IP it is the wildcard
	V6Only  bool           // IPV6_V6ONLY of the socket
}

// Addr returns the endpoint in the form that package net uses in errors.
func (ep Endpoint) Addr() *net.TCPAddr { return net.TCPAddrFromAddrPort(ep.At) }

// Domain returns the socket's address family.
func (ep Endpoint) Domain() int {
	if ep.Network == "tcp6" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// Wildcard reports whether the endpoint is the wildcard of one family or of both.
func (ep Endpoint) Wildcard() bool {
	ip := ep.At.Addr().Unmap().WithZone("")
	return !ip.IsValid() || ip.IsUnspecified()
}

// ErrNoted stops net.Listen when the endpoint is known.
var ErrNoted = errors.New("endpoint noted")

// Resolve applies the rules of package net to an address. It parses a literal IP address
// with a numeric port itself. It passes every other address (names, services, zones,
// wildcards, malformed addresses) to net.Listen, and stops it when it has made a socket.
// So the family and all errors are those of package net.
func Resolve(k *sys.Calls, ctx context.Context, network, address string) (Endpoint, error) {
	if ep, ok := literal(network, address); ok {
		return ep, nil
	}
	port, hostless := PortAlone(address)
	if known, ok := k.Memory.Load(withoutHost(network)); ok && hostless {
		ep := known.(Endpoint)
		ep.At = netip.AddrPortFrom(netip.Addr{}, port)
		return ep, nil
	}
	var ep Endpoint
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		ep.Network = network
		if network == "tcp6" {
			v, err := RawInt(c, func(fd int) (int, error) {
				return k.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
			})
			if err != nil {
				return err
			}
			ep.V6Only = v != 0
		}
		return ErrNoted
	}}
	lc.SetMultipathTCP(false) // the socket of the Listener is plain TCP too
	_, err := lc.Listen(ctx, network, address)
	var op *net.OpError
	if !errors.As(err, &op) || !errors.Is(op.Err, ErrNoted) {
		return Endpoint{}, err
	}
	ep.At = op.Addr.(*net.TCPAddr).AddrPort()
	host, _, _ := net.SplitHostPort(address)
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() != "" {
		ep.At = netip.AddrPortFrom(ip, ep.At.Port()) // net turns "::" into 0.0.0.0, which has no zone
	}
	if hostless {
		k.Memory.Store(withoutHost(network), Endpoint{Network: ep.Network, V6Only: ep.V6Only})
	}
	return ep, nil
}

// withoutHost is a key of the endpoint that package net chooses for an address without a
// host, by network. Package net probes the system for it once per process, so the result
// does not change.
type withoutHost string

// PortAlone parses an address that has a numeric port and no host, such as ":8080".
func PortAlone(address string) (port uint16, ok bool) {
	digits, ok := strings.CutPrefix(address, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	return uint16(n), ok && err == nil
}

// literal parses an address whose family is obvious. A wildcard is not such an address,
// because package net makes it dual-stack if it can.
func literal(network, address string) (Endpoint, bool) {
	ap, err := netip.ParseAddrPort(address)
	ip := ap.Addr()
	if err != nil || ip.IsUnspecified() || ip.Is4In6() || ip.Zone() != "" {
		return Endpoint{}, false
	}
	ep := Endpoint{Network: "tcp4", At: ap, V6Only: network == "tcp6"}
	if ip.Is6() {
		ep.Network = "tcp6"
		// IPV6_V6ONLY cannot be changed on these systems. Package net handles that.
		if runtime.GOOS == "openbsd" || runtime.GOOS == "dragonfly" {
			return Endpoint{}, false
		}
	}
	return ep, network == "tcp" || network == ep.Network
}

// Sockaddr returns the address to bind to. It is an error if the zone does not exist.
// For a link-local address that error comes from bind(2), as in package net. For other
// addresses the kernel ignores the zone, so sockaddr looks it up.
func (ep Endpoint) Sockaddr() (unix.Sockaddr, error) { return ep.SockaddrAmong(net.Interfaces) }

// SockaddrAmong is sockaddr with a function that lists the interfaces. If the list is empty,
// no zone can be looked up, and SockaddrAmong ignores it as package net does. On DragonFly
// since 5.7 package net finds no interface, because the kernel's structure has changed.
func (ep Endpoint) SockaddrAmong(interfaces func() ([]net.Interface, error)) (unix.Sockaddr, error) {
	ip, port := ep.At.Addr(), int(ep.At.Port())
	zone, err := zoneIndex(ip.Zone())
	if err != nil && !ip.IsLinkLocalUnicast() {
		if sysErr := new(os.SyscallError); errors.As(err, &sysErr) {
			return nil, fmt.Errorf("zone %s: %w", ip.Zone(), sysErr)
		}
		if all, err := interfaces(); err != nil || len(all) > 0 {
			return nil, &net.AddrError{Err: "no such zone", Addr: ep.Addr().String()}
		}
	}
	if ep.Network == "tcp4" {
		sa := &unix.SockaddrInet4{Port: port}
		if !ep.Wildcard() {
			sa.Addr = ip.Unmap().As4()
		}
		return sa, nil
	}
	sa := &unix.SockaddrInet6{Port: port, ZoneId: zone}
	if !ep.Wildcard() { // on a dual-stack socket 0.0.0.0 is [::]
		sa.Addr = ip.As16()
	}
	return sa, nil
}

// zoneIndex returns the index of the interface of a zone, which is a name or a number. It
// returns 0 for an empty zone. For a number it returns the index with the error too.
func zoneIndex(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	ifi, err := net.InterfaceByName(zone)
	if err == nil {
		return uint32(ifi.Index), nil
	}
	n, _ := strconv.ParseUint(zone, 10, 31) // 0 if zone is not a number, the maximum if it is too large
	if n > 0 {
		_, err = net.InterfaceByIndex(int(n))
	}
	return uint32(n), err
}

// Local returns the address that fd is bound to.
func Local(k *sys.Calls, fd int) (netip.AddrPort, error) {
	sa, err := k.Getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(sa.Addr)
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return netip.AddrPortFrom(ip, uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
}

// RawInt calls f with the descriptor of c. An error of f becomes an error of getsockopt.
func RawInt(c syscall.RawConn, f func(fd int) (int, error)) (v int, err error) {
	cerr := c.Control(func(fd uintptr) { v, err = f(int(fd)) })
	return v, cmp.Or(cerr, os.NewSyscallError("getsockopt", err))
}
