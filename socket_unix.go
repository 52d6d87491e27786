//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// system is what the package asks of the kernel. It is handed down, so that a
// test can put a failing call in the place of one of them.
type system struct {
	socket        func(domain int) (fd int, err error) // a stream socket, close-on-exec
	setsockoptInt func(fd, level, name, value int) error
	getsockoptInt func(fd, level, name int) (int, error)
	getsockname   func(fd int) (unix.Sockaddr, error)
	bind          func(fd int, sa unix.Sockaddr) error
	listenCall    func(fd, backlog int) error
	adopt         func(*os.File) (net.Listener, error)
	// What net makes of an address without a host: an endpoint without an address,
	// by network. net looks at the system for it once in the life of a process, so it
	// is asked once.
	wildcards *sync.Map
	kernel    // what one system only has
}

var realSystem = system{
	socket:        streamSocket,
	setsockoptInt: unix.SetsockoptInt,
	getsockoptInt: unix.GetsockoptInt,
	getsockname:   unix.Getsockname,
	bind:          unix.Bind,
	listenCall:    unix.Listen,
	adopt:         net.FileListener,
	wildcards:     new(sync.Map),
	kernel:        realKernel,
}

// An endpoint is where to listen, as net resolved it.
type endpoint struct {
	network string       // "tcp4" or "tcp6", the socket's family
	addr    *net.TCPAddr // as net has it in errors; no IP is the wildcard
	v6only  bool         // IPV6_V6ONLY of the socket
}

// errNoted ends net's listening once the endpoint is known.
var errNoted = errors.New("acceptq: endpoint noted")

// resolve applies net's rules to an address. A literal IP address with a number
// for a port is taken apart here. Anything else (names, services, zones,
// wildcards, what is malformed) is given to net itself, up to the moment at which
// it has a socket of the right kind, so that the choice of the family and every
// error are net's own.
func (sys *system) resolve(ctx context.Context, network, address string) (endpoint, error) {
	if ep, ok := literal(network, address); ok {
		return ep, nil
	}
	port, hostless := portAlone(address)
	if known, ok := sys.wildcards.Load(network); ok && hostless {
		ep := known.(endpoint)
		ep.addr = &net.TCPAddr{Port: port}
		return ep, nil
	}
	var ep endpoint
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		ep.network = network
		if network == "tcp6" {
			v, err := rawInt(c, func(fd int) (int, error) {
				return sys.getsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
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
	ep.addr = op.Addr.(*net.TCPAddr)
	if hostless {
		sys.wildcards.Store(network, endpoint{network: ep.network, v6only: ep.v6only})
	}
	return ep, nil
}

// portAlone takes apart an address that is nothing but a number for a port.
func portAlone(address string) (port int, ok bool) {
	digits, ok := strings.CutPrefix(address, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	return int(n), ok && err == nil
}

// literal takes apart an address that needs no rule: its family is plain and it
// is no wildcard, which net makes dual-stack where it can.
func literal(network, address string) (endpoint, bool) {
	ap, err := netip.ParseAddrPort(address)
	ip := ap.Addr()
	if err != nil || ip.IsUnspecified() || ip.Is4In6() || ip.Zone() != "" {
		return endpoint{}, false
	}
	ep := endpoint{network: "tcp4", addr: net.TCPAddrFromAddrPort(ap), v6only: network == "tcp6"}
	if ip.Is6() {
		ep.network = "tcp6"
		// These two have IPV6_V6ONLY fixed: net knows when not to set it.
		if runtime.GOOS == "openbsd" || runtime.GOOS == "dragonfly" {
			return endpoint{}, false
		}
	}
	return ep, network == "tcp" || network == ep.network
}

// listen makes the socket, from the address to the adoption by net.
func (sys *system) listen(ctx context.Context, network, address string, o *options) (*Listener, error) {
	ep, err := sys.resolve(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l, err := sys.open(ctx, ep, o)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: ep.addr, Err: err}
	}
	return l, nil
}

func (sys *system) open(ctx context.Context, ep endpoint, o *options) (*Listener, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keepAlive, err := sys.tryKeepAlive(o.keepAlive)
	if err != nil {
		return nil, err
	}
	if o.strict {
		// Refused before bind where that can be foreseen: nobody sees the port.
		// What the socket says afterwards is the judge all the same.
		if b, err := sys.predict(o.backlog); err == nil && b.Clamped() {
			return nil, sys.tooShort(b)
		}
	}
	file, err := sys.bindSocket(ep, o)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fd := int(file.Fd())
	account, err := sys.listenAgain(fd, o.backlog)
	if err != nil {
		return nil, err
	}
	if err := sys.setListening(fd, account.Limit, o); err != nil {
		return nil, err
	}
	if o.strict && (account.Clamped() || account.Limit == unknown) {
		return nil, sys.tooShort(account)
	}

	ln, err := sys.adopt(file)
	if err != nil {
		return nil, cause(err)
	}
	l, err := newListener(sys, ln.(*net.TCPListener), plainTCP, account)
	if err != nil {
		ln.Close()
		return nil, err
	}
	l.strict, l.keepAlive = o.strict, keepAlive
	return l, nil
}

// bindSocket makes a socket that is bound to ep and does not listen yet.
func (sys *system) bindSocket(ep endpoint, o *options) (*os.File, error) {
	sa, err := ep.sockaddr()
	if err != nil {
		return nil, err
	}
	domain := unix.AF_INET
	if ep.network == "tcp6" {
		domain = unix.AF_INET6
	}
	fd, err := sys.socket(domain)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// The file owns the descriptor from here on, and net gets a copy. It is in
	// blocking mode until then: os would add a non-blocking one to the poller.
	file := os.NewFile(uintptr(fd), "tcp listener")
	bound := false
	defer func() {
		if !bound { // a hook may have panicked
			file.Close()
		}
	}()
	if err := sys.setOptions(fd, ep, o); err != nil {
		return nil, err
	}
	if len(o.controls) > 0 {
		raw, err := file.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := o.control(ep.network, ep.addr.String(), raw); err != nil {
			return nil, err
		}
	}
	if err := sys.bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	bound = true
	return file, nil
}

// listenShards makes listeners on one address as long as more says so.
func (sys *system) listenShards(ctx context.Context, network, address string, o *options, more func(*Listener) bool) error {
	if _, err := reusePort(); err != nil {
		return &net.OpError{Op: "listen", Net: network, Err: notHere("more than one shard")}
	}
	ep, err := sys.resolve(ctx, network, address)
	if err != nil {
		return err
	}
	fail := func(err error) error { return &net.OpError{Op: "listen", Net: network, Addr: ep.addr, Err: err} }
	if !o.reusePort {
		alone := o
		sharing := *o
		sharing.reusePort = true
		o = &sharing
		switch runtime.GOOS {
		case "linux", "android":
			// The first shard listens without the option, as no two can on one
			// address, and gets it then; the second makes a group of them. That it is
			// bound proves nothing: until they listen, two that start together both are.
			l, err := sys.open(ctx, ep, alone)
			if err != nil {
				return fail(err)
			}
			ep.addr = l.Addr().(*net.TCPAddr)
			operr := l.raw.Control(func(fd uintptr) { err = sys.setReusePort(int(fd)) })
			if err := cmp.Or(operr, err); err != nil {
				l.Close()
				return fail(err)
			}
			if !more(l) {
				return nil
			}
		default:
			// The address is claimed by a socket without the option, beside which no
			// other can be bound. It gets the option then, so that the shards can be,
			// and never listens: FreeBSD spreads over those that were bound with it.
			claim, err := sys.bindSocket(ep, alone)
			if err != nil {
				return fail(err)
			}
			defer claim.Close()
			if err := sys.setReusePort(int(claim.Fd())); err != nil {
				return fail(err)
			}
			if ep.addr, err = sys.localAddr(int(claim.Fd())); err != nil {
				return fail(err)
			}
		}
	}
	for range maxGroup() {
		l, err := sys.open(ctx, ep, o)
		if err != nil {
			return fail(err)
		}
		ep.addr = l.Addr().(*net.TCPAddr)
		if !more(l) {
			return nil
		}
	}
	return fail(notHere(fmt.Sprintf("more than %d shards", maxGroup())))
}

// sockaddr is the address to bind to. A zone names an interface or is its
// number; with one that does not exist the kernel refuses a link-local address,
// as it does for net, and we refuse any other, where it would be ignored.
func (ep endpoint) sockaddr() (unix.Sockaddr, error) {
	a := ep.addr
	if ep.network == "tcp4" {
		sa := &unix.SockaddrInet4{Port: a.Port}
		copy(sa.Addr[:], a.IP.To4())
		return sa, nil
	}
	sa := &unix.SockaddrInet6{Port: a.Port}
	if !a.IP.Equal(net.IPv4zero) { // on a dual-stack socket 0.0.0.0 is [::]
		copy(sa.Addr[:], a.IP.To16())
	}
	if a.Zone != "" {
		sa.ZoneId = zoneIndex(a.Zone)
		if sa.ZoneId == 0 && !a.IP.IsLinkLocalUnicast() {
			return nil, &net.AddrError{Err: "no such zone", Addr: a.String()}
		}
	}
	return sa, nil
}

func zoneIndex(zone string) uint32 {
	if ifi, err := net.InterfaceByName(zone); err == nil {
		return uint32(ifi.Index)
	}
	n, _ := strconv.ParseUint(zone, 10, 31)
	return uint32(n)
}

// setOptions sets what net.Listen sets, then what was asked for.
func (sys *system) setOptions(fd int, ep endpoint, o *options) error {
	if ep.network == "tcp6" {
		if err := sys.setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, boolInt(ep.v6only)); err != nil {
			return err
		}
	}
	if runtime.GOOS == "dragonfly" {
		// Its default range of ephemeral ports is narrow, see net/sockopt_bsd.go.
		const ipPortRange, ipv6PortRange, high = 0x13, 0xe, 1 // netinet/in.h, netinet6/in6.h
		level, name := unix.IPPROTO_IP, ipPortRange
		if ep.network == "tcp6" {
			level, name = unix.IPPROTO_IPV6, ipv6PortRange
		}
		if err := sys.setInt(fd, level, name, high); err != nil {
			return err
		}
	}
	if err := sys.setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if o.reusePort {
		if err := ep.spreads(); err != nil {
			return err
		}
		if err := sys.setReusePort(fd); err != nil {
			return err
		}
	}
	if err := sys.setBuffer(fd, "WithReceiveBuffer", unix.SO_RCVBUF, o.receiveBuffer); err != nil {
		return err
	}
	if err := sys.setBuffer(fd, "WithSendBuffer", unix.SO_SNDBUF, o.sendBuffer); err != nil {
		return err
	}
	return sys.setClosed(fd, o)
}

func (sys *system) setReusePort(fd int) error {
	name, err := reusePort()
	if err != nil {
		return err
	}
	return sys.setInt(fd, unix.SOL_SOCKET, name, 1)
}

// setBuffer asks for a buffer of n bytes, if n is not 0, and sees to it that it
// was granted: on Linux and macOS a smaller one is no error of the kernel's.
func (sys *system) setBuffer(fd int, option string, name, n int) error {
	if n == 0 {
		return nil
	}
	err := sys.setInt(fd, unix.SOL_SOCKET, name, min(n, math.MaxInt32))
	if errors.Is(err, unix.ENOBUFS) { // the BSDs do say so
		return fmt.Errorf("%s(%d): more than %s: %w: %w", option, n, bufferKnob(name), errors.ErrUnsupported, err)
	}
	if err != nil {
		return err
	}
	granted, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, name)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if runtime.GOOS == "linux" || runtime.GOOS == "android" {
		granted /= 2 // the kernel doubles it for its own needs, socket(7)
	}
	if granted < n {
		return fmt.Errorf("%s(%d): granted %d, see %s: %w", option, n, granted, bufferKnob(name), errors.ErrUnsupported)
	}
	return nil
}

// tryKeepAlive has net set config on a socket that is thrown away: what the
// kernel refuses there it would refuse on each connection. It returns what to set
// on those. Where config leaves a value to the system that is the system's own, for
// by the time a connection is accepted net has replaced it.
func (sys *system) tryKeepAlive(config *net.KeepAliveConfig) (*net.KeepAliveConfig, error) {
	if config == nil || !config.Enable {
		return config, nil
	}
	fd, err := sys.socket(unix.AF_INET)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "keep-alive")
	defer file.Close()
	full, err := sys.fillKeepAlive(fd, *config)
	if err == nil {
		var c net.Conn
		if c, err = net.FileConn(file); err == nil {
			defer c.Close()
			err = c.(*net.TCPConn).SetKeepAliveConfig(full)
		}
	}
	if errors.Is(err, unix.ENOPROTOOPT) { // OpenBSD sets no times, and not all tell theirs
		return nil, fmt.Errorf("WithKeepAlive: %w: %w", errors.ErrUnsupported, cause(err))
	}
	if err != nil {
		return nil, fmt.Errorf("WithKeepAlive: %w", cause(err))
	}
	return &full, nil
}

// fillKeepAlive puts the values that fd, a fresh socket, has from the system in
// the place of negative ones.
func (sys *system) fillKeepAlive(fd int, config net.KeepAliveConfig) (net.KeepAliveConfig, error) {
	names, ok := keepAliveNames()
	if !ok {
		return config, nil // net has not set them either
	}
	var err error
	own := func(name int) (n int) {
		if err == nil {
			n, err = sys.getsockoptInt(fd, unix.IPPROTO_TCP, name)
		}
		return n
	}
	if config.Idle < 0 {
		config.Idle = time.Duration(own(names[0])) * time.Second
	}
	if config.Interval < 0 {
		config.Interval = time.Duration(own(names[1])) * time.Second
	}
	if config.Count < 0 {
		config.Count = own(names[2])
	}
	return config, os.NewSyscallError("getsockopt", err)
}

// localAddr is the address that fd is bound to.
func (sys *system) localAddr(fd int) (*net.TCPAddr, error) {
	sa, err := sys.getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}, nil
	case *unix.SockaddrInet6:
		a := &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
		if sa.ZoneId != 0 {
			a.Zone = strconv.FormatUint(uint64(sa.ZoneId), 10)
		}
		return a, nil
	}
	return nil, os.NewSyscallError("getsockname", err)
}

// reusePort is the socket option with which the kernel spreads connections over
// the listeners of one address. SO_REUSEPORT of macOS, NetBSD, OpenBSD and
// FreeBSD gives them all to one.
func reusePort() (name int, err error) {
	switch runtime.GOOS {
	case "linux", "android", "dragonfly":
		return unix.SO_REUSEPORT, nil
	case "freebsd":
		return 0x10000, nil // SO_REUSEPORT_LB, sys/socket.h; x/sys has it for FreeBSD only
	}
	return 0, notHere("WithReusePort")
}

// spreads refuses an address over whose listeners the kernel does not spread,
// though it takes the option: FreeBSD leaves the wildcard of both families out of
// the group (in_pcbinslbgrouphash in netinet/in_pcb.c) and gives all to one.
func (ep endpoint) spreads() error {
	if runtime.GOOS == "freebsd" && ep.network == "tcp6" && !ep.v6only && (len(ep.addr.IP) == 0 || ep.addr.IP.IsUnspecified()) {
		return fmt.Errorf("%w, listen on tcp4 and on tcp6", notHere("WithReusePort for both families at once"))
	}
	return nil
}

// maxGroup is how many listeners the kernel spreads over; FreeBSD lets more be
// bound and gives them nothing (INPCBLBGROUP_SIZMAX in netinet/in_pcb.c).
func maxGroup() int {
	if runtime.GOOS == "freebsd" {
		return 256
	}
	return math.MaxInt
}

func (sys *system) setInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", sys.setsockoptInt(fd, level, name, value))
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// rawInt runs f on the descriptor of c, and names its system call getsockopt.
func rawInt(c syscall.RawConn, f func(fd int) (int, error)) (v int, err error) {
	cerr := c.Control(func(fd uintptr) { v, err = f(int(fd)) })
	if cerr != nil {
		return 0, cerr
	}
	return v, os.NewSyscallError("getsockopt", err)
}

// listenAgain calls listen(2) for a request of n connections, on a bound socket
// or on one that listens already, and finds out what was granted. The ceiling
// in the account is unknown, for it is read when asked for, except where the
// rule needed it.
func (sys *system) listenAgain(fd, n int) (Backlog, error) {
	r, _ := ruleOf(runtime.GOOS)
	if err := sys.listenCall(fd, r.argument(n)); err != nil {
		return Backlog{}, os.NewSyscallError("listen", err)
	}
	if limit, ok := sys.limit(fd); ok {
		return r.account(n, unknown, limit, true), nil
	}
	b, _ := sys.predict(n) // what cannot be read is unknown, and no failure
	return b, nil
}

// tooShort is the error of a strict request that got b.
func (sys *system) tooShort(b Backlog) error {
	if b.Limit == unknown {
		return fmt.Errorf("WithStrictBacklog: the limit cannot be known: %w", errors.ErrUnsupported)
	}
	r, _ := ruleOf(runtime.GOOS)
	ceiling, _, _ := sys.bounds()
	return r.clamp(b.Requested, b.Limit, ceiling)
}

// setBacklog calls listen(2) again on the listening socket fd. A strict one is
// left with the limit it had when the kernel would grant less than n.
func (sys *system) setBacklog(fd, n int, strict bool, former Backlog) (Backlog, error) {
	if strict {
		if b, err := sys.predict(n); err == nil && b.Clamped() {
			return former, sys.tooShort(b)
		}
	}
	b, err := sys.listenAgain(fd, n)
	if err != nil {
		return former, err // what was granted before is granted still
	}
	if !strict || !b.Clamped() && b.Limit != unknown {
		return b, nil
	}
	// It could not be foreseen; the way back is the same call.
	back, err := sys.listenAgain(fd, former.Limit)
	if err != nil {
		return b, err
	}
	back.Requested = former.Requested
	return back, sys.tooShort(b)
}

// adopted finds out what can be known of a listening socket that was not made
// here.
func (sys *system) adopted(fd int) (transport, Backlog, error) {
	r, _ := ruleOf(runtime.GOOS)
	if err := sys.mustListen(fd); err != nil {
		return transportUnknown, Backlog{}, err
	}
	limit, ok := sys.limit(fd)
	return sys.transportOf(fd), r.account(-1, unknown, limit, ok), nil
}

// mustListen refuses what is no listening TCP socket. SO_ACCEPTCONN is 2 on
// FreeBSD.
func (sys *system) mustListen(fd int) error {
	listening, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	sa, err := sys.getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa.(type) {
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		if listening != 0 {
			return nil
		}
	}
	return errNotListening
}
