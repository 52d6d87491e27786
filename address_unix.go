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

// An endpoint is where to listen, as net resolved it.
type endpoint struct {
	network string         // "tcp4" or "tcp6", the socket's family
	at      netip.AddrPort // no valid IP is the wildcard
	v6only  bool           // IPV6_V6ONLY of the socket
}

// addr is the endpoint as net has it in errors.
func (ep endpoint) addr() *net.TCPAddr { return net.TCPAddrFromAddrPort(ep.at) }

// domain is the socket's address family.
func (ep endpoint) domain() int {
	if ep.network == "tcp6" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// wildcard says that the endpoint is every address of its family, or of both.
func (ep endpoint) wildcard() bool {
	ip := ep.at.Addr().Unmap().WithZone("")
	return !ip.IsValid() || ip.IsUnspecified()
}

// errNoted ends net's listening once the endpoint is known.
var errNoted = errors.New("acceptq: endpoint noted")

// resolve applies net's rules to an address. A literal IP address with a number
// for a port is taken apart here. Anything else (names, services, zones,
// wildcards, what is malformed) is given to net itself, up to the moment at which
// it has a socket of the right kind, so that the choice of the family and every
// error are net's own.
func (k *kernel) resolve(ctx context.Context, network, address string) (endpoint, error) {
	if ep, ok := literal(network, address); ok {
		return ep, nil
	}
	port, hostless := portAlone(address)
	if known, ok := k.withoutHost.Load(network); ok && hostless {
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
	lc.SetMultipathTCP(false) // the socket that serves is plain TCP too
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
		k.withoutHost.Store(network, endpoint{network: ep.network, v6only: ep.v6only})
	}
	return ep, nil
}

// portAlone takes apart an address that is nothing but a number for a port.
func portAlone(address string) (port uint16, ok bool) {
	digits, ok := strings.CutPrefix(address, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	return uint16(n), ok && err == nil
}

// literal takes apart an address that needs no rule: its family is plain and it
// is no wildcard, which net makes dual-stack where it can.
func literal(network, address string) (endpoint, bool) {
	ap, err := netip.ParseAddrPort(address)
	ip := ap.Addr()
	if err != nil || ip.IsUnspecified() || ip.Is4In6() || ip.Zone() != "" {
		return endpoint{}, false
	}
	ep := endpoint{network: "tcp4", at: ap, v6only: network == "tcp6"}
	if ip.Is6() {
		ep.network = "tcp6"
		// These two have IPV6_V6ONLY fixed: net knows when not to set it.
		if runtime.GOOS == "openbsd" || runtime.GOOS == "dragonfly" {
			return endpoint{}, false
		}
	}
	return ep, network == "tcp" || network == ep.network
}

// sockaddr returns the address to bind to. A zone that does not exist is an
// error. Only bind(2) looks at the zone of a link-local address, so that the error
// is the kernel's, as it is net's; the zone of another address is looked up here,
// because the kernel ignores it.
func (ep endpoint) sockaddr() (unix.Sockaddr, error) {
	ip, port := ep.at.Addr(), int(ep.at.Port())
	zone, err := zoneIndex(ip.Zone())
	if err != nil && !ip.IsLinkLocalUnicast() {
		if sysErr := new(os.SyscallError); errors.As(err, &sysErr) {
			return nil, fmt.Errorf("zone %s: %w", ip.Zone(), sysErr)
		}
		return nil, &net.AddrError{Err: "no such zone", Addr: ep.addr().String()}
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

// zoneIndex returns the index of the interface that a zone names or numbers; 0 for
// no zone. The index of a number comes with the error too.
func zoneIndex(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	ifi, err := net.InterfaceByName(zone)
	if err == nil {
		return uint32(ifi.Index), nil
	}
	n, _ := strconv.ParseUint(zone, 10, 31) // 0 if it is no number, the largest if it does not fit
	if n > 0 {
		_, err = net.InterfaceByIndex(int(n))
	}
	return uint32(n), err
}

// localAddr is the address that fd is bound to.
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

// rawInt runs f on the descriptor of c, and names its system call getsockopt.
func rawInt(c syscall.RawConn, f func(fd int) (int, error)) (v int, err error) {
	cerr := c.Control(func(fd uintptr) { v, err = f(int(fd)) })
	return v, cmp.Or(cerr, os.NewSyscallError("getsockopt", err))
}
