//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

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
)

// An endpoint is a resolved address to listen on.
type endpoint struct {
	network string         // "tcp4" or "tcp6", the socket's family
	at      netip.AddrPort // without a valid IP it is the wildcard
	v6only  bool           // IPV6_V6ONLY of the socket
}

// addr returns the endpoint in the form that package net uses in errors.
func (ep endpoint) addr() *net.TCPAddr { return net.TCPAddrFromAddrPort(ep.at) }

// domain returns the socket's address family.
func (ep endpoint) domain() int {
	if ep.network == "tcp6" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// wildcard reports whether the endpoint is the wildcard of one family or of both.
func (ep endpoint) wildcard() bool {
	ip := ep.at.Addr().Unmap().WithZone("")
	return !ip.IsValid() || ip.IsUnspecified()
}

// errNoted stops net.Listen when the endpoint is known.
var errNoted = errors.New("endpoint noted")

// resolve applies the rules of package net to an address. It parses a literal IP address
// with a numeric port itself. It passes every other address (names, services, zones,
// wildcards, malformed addresses) to net.Listen, and stops it when it has made a socket.
// So the family and all errors are those of package net.
func (k *kernel) resolve(ctx context.Context, network, address string) (endpoint, error) {
	if ep, ok := literal(network, address); ok {
		return ep, nil
	}
	port, hostless := portAlone(address)
	if known, ok := k.memory.Load(withoutHost(network)); ok && hostless {
		ep := known.(endpoint)
		ep.at = netip.AddrPortFrom(netip.Addr{}, port)
		return ep, nil
	}
	var ep endpoint
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		ep.network = network
		if network == "tcp6" {
			v, err := rawInt(c, func(fd int) (int, error) {
				return k.getsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
			})
			if err != nil {
				return err
			}
			ep.v6only = v != 0
		}
		return errNoted
	}}
	lc.SetMultipathTCP(false) // the socket of the Listener is plain TCP too
	_, err := lc.Listen(ctx, network, address)
	var op *net.OpError
	if !errors.As(err, &op) || !errors.Is(op.Err, errNoted) {
		return endpoint{}, err
	}
	ep.at = op.Addr.(*net.TCPAddr).AddrPort()
	host, _, _ := net.SplitHostPort(address)
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() != "" {
		ep.at = netip.AddrPortFrom(ip, ep.at.Port()) // net turns "::" into 0.0.0.0, which has no zone
	}
	if hostless {
		k.memory.Store(withoutHost(network), endpoint{network: ep.network, v6only: ep.v6only})
	}
	return ep, nil
}

// withoutHost is a key of the endpoint that package net chooses for an address without a
// host, by network. Package net probes the system for it once per process, so the result
// does not change.
type withoutHost string

// portAlone parses an address that has a numeric port and no host, such as ":8080".
func portAlone(address string) (port uint16, ok bool) {
	digits, ok := strings.CutPrefix(address, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	return uint16(n), ok && err == nil
}

// literal parses an address whose family is obvious. A wildcard is not such an address,
// because package net makes it dual-stack if it can.
func literal(network, address string) (endpoint, bool) {
	ap, err := netip.ParseAddrPort(address)
	ip := ap.Addr()
	if err != nil || ip.IsUnspecified() || ip.Is4In6() || ip.Zone() != "" {
		return endpoint{}, false
	}
	ep := endpoint{network: "tcp4", at: ap, v6only: network == "tcp6"}
	if ip.Is6() {
		ep.network = "tcp6"
		// IPV6_V6ONLY cannot be changed on these systems. Package net handles that.
		if runtime.GOOS == "openbsd" || runtime.GOOS == "dragonfly" {
			return endpoint{}, false
		}
	}
	return ep, network == "tcp" || network == ep.network
}

// sockaddr returns the address to bind to. It is an error if the zone does not exist.
// For a link-local address that error comes from bind(2), as in package net. For other
// addresses the kernel ignores the zone, so sockaddr looks it up.
func (ep endpoint) sockaddr() (unix.Sockaddr, error) { return ep.sockaddrAmong(net.Interfaces) }

// sockaddrAmong is sockaddr with a function that lists the interfaces. If the list is empty,
// no zone can be looked up, and sockaddrAmong ignores it as package net does. On DragonFly
// since 5.7 package net finds no interface, because the kernel's structure has changed.
func (ep endpoint) sockaddrAmong(interfaces func() ([]net.Interface, error)) (unix.Sockaddr, error) {
	ip, port := ep.at.Addr(), int(ep.at.Port())
	zone, err := zoneIndex(ip.Zone())
	if err != nil && !ip.IsLinkLocalUnicast() {
		if sysErr := new(os.SyscallError); errors.As(err, &sysErr) {
			return nil, fmt.Errorf("zone %s: %w", ip.Zone(), sysErr)
		}
		if all, err := interfaces(); err != nil || len(all) > 0 {
			return nil, &net.AddrError{Err: "no such zone", Addr: ep.addr().String()}
		}
	}
	if ep.network == "tcp4" {
		sa := &unix.SockaddrInet4{Port: port}
		if !ep.wildcard() {
			sa.Addr = ip.Unmap().As4()
		}
		return sa, nil
	}
	sa := &unix.SockaddrInet6{Port: port, ZoneId: zone}
	if !ep.wildcard() { // on a dual-stack socket 0.0.0.0 is [::]
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

// localAddr returns the address that fd is bound to.
func (k *kernel) localAddr(fd int) (netip.AddrPort, error) {
	sa, err := k.getsockname(fd)
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

// rawInt calls f with the descriptor of c. An error of f becomes an error of getsockopt.
func rawInt(c syscall.RawConn, f func(fd int) (int, error)) (v int, err error) {
	cerr := c.Control(func(fd uintptr) { v, err = f(int(fd)) })
	return v, cmp.Or(cerr, os.NewSyscallError("getsockopt", err))
}
