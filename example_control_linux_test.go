package acceptq_test

import (
	"cmp"
	"fmt"
	"log"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
)

// Listen on an address that this machine does not have yet (ip(7)).
func ExampleWithControl_freeBind() {
	freeBind := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("192.0.2.1:0", acceptq.WithControl(freeBind))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	fmt.Println(ln.Addr().(*net.TCPAddr).IP)
	// Output: 192.0.2.1
}

// Accept connections to addresses of other machines, which a firewall rule redirects to
// this machine (ip(7)). This needs CAP_NET_ADMIN.
func ExampleWithControl_transparent() {
	transparent := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("192.0.2.1:0", acceptq.WithControl(transparent))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	// Output:
}

// Accept connections from one interface only (socket(7)). Before Linux 5.7 this needs
// CAP_NET_RAW.
func ExampleWithControl_bindToDevice() {
	bindToDevice := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "lo") })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP(":0", acceptq.WithControl(bindToDevice))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	// Output:
}

// Mark the packets of the connections, for firewall and routing rules (socket(7)).
// This needs CAP_NET_ADMIN.
func ExampleWithControl_mark() {
	mark := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 42) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(mark))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	// Output:
}

// Send packets with a DSCP, here EF. It is the upper six bits of the IPv4 type of service
// (ip(7)). On IPv6 use IPPROTO_IPV6 and IPV6_TCLASS. For a listener on both families set
// both.
func ExampleWithControl_dscp() {
	dscp := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, 46<<2) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(dscp))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	fmt.Println(option(ln, unix.IPPROTO_IP, unix.IP_TOS))
	// Output: 184
}

// Close a connection if its data stay unacknowledged for 30 s (tcp(7)).
func ExampleWithControl_userTimeout() {
	userTimeout := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30_000) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(userTimeout))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	fmt.Println(option(ln, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT), "ms")
	// Output: 30000 ms
}

// Accept segments from 192.0.2.7 only with a signature by this key (RFC 2385). The
// kernel must be built with CONFIG_TCP_MD5SIG.
func ExampleWithControl_md5() {
	md5 := func(network, address string, c syscall.RawConn) (err error) {
		sig := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}}
		copy(sig.Addr.Data[2:], []byte{192, 0, 2, 7}) // the peer, after its port
		sig.Keylen = uint16(copy(sig.Key[:], "secret"))
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(md5))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	// Output:
}

// Choose the congestion control of the connections (tcp(7)).
func ExampleWithControl_congestion() {
	congestion := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(congestion))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	raw, _ := ln.SyscallConn()
	raw.Control(func(fd uintptr) { fmt.Println(unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)) })
	// Output: reno <nil>
}

// Set any option whose value is a number, here the maximum segment size, TCP_MAXSEG
// (tcp(7)).
func ExampleWithControl_maxSegment() {
	maxSegment := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, 1200) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(maxSegment))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	fmt.Println(option(ln, unix.IPPROTO_TCP, unix.TCP_MAXSEG))
	// Output: 1200
}

// Option reads an option of a listening socket.
func option(ln *acceptq.Listener, level, name int) (value int) {
	raw, err := ln.SyscallConn()
	if err != nil {
		log.Print(err)
		return -1
	}
	cerr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
	if err := cmp.Or(cerr, err); err != nil {
		log.Print(err)
	}
	return value
}
