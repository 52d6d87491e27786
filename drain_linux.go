package acceptq

import (
	"cmp"
	"encoding/binary"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A stop keeps new handshakes from a listening socket while those in flight go
// on. Connections that are made meanwhile inherit it.
type stop struct {
	filter bool // a socket filter drops SYNs
	// Else packets need a TTL of 255, which few systems send. What they needed
	// before, by IP_MINTTL and IPV6_MINHOPCOUNT; -1 where the socket has no such
	// option.
	ttl, hops int
}

const maxTTL = 255

// intake is the stop that connections of a Listener may have inherited. It stays
// after the stop is lifted: some that wait in the queue were made before that.
type intake struct{ inherited atomic.Pointer[stop] }

// dropSYN is a socket filter, which sees a packet from its TCP header on: flags
// are byte 13. A SYN without an ACK is dropped, all else passes.
var dropSYN = [...]unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13},
	{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: tcpSYN | tcpACK},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: tcpSYN, Jt: 0, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
}

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// stop stops the intake of fd and reports whether it could.
func (in *intake) stop(sys *system, fd int) bool {
	former := in.inherited.Load()
	for _, way := range sys.ways(fd) {
		// Noted first: a connection may be made, and taken, right after.
		in.inherited.Store(&way)
		if sys.apply(fd, way) == nil {
			return true
		}
	}
	in.inherited.Store(former)
	return false
}

// ways are the stops to try on fd, in order.
func (sys *system) ways(fd int) (ways []stop) {
	// A filter that is there already is the user's, and would be replaced.
	if n, err := sys.getsockopt(fd, unix.SOL_SOCKET, unix.SO_GET_FILTER, nil); err == nil && n == 0 {
		ways = append(ways, stop{filter: true})
	}
	var err error
	s := stop{}
	if s.ttl, err = sys.getsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL); err != nil {
		s.ttl = unknown
	}
	if s.hops, err = sys.getsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT); err != nil {
		s.hops = unknown
	}
	// Where 255 is required already, the clients send it.
	if s.ttl < maxTTL && s.hops < maxTTL && max(s.ttl, s.hops) != unknown {
		ways = append(ways, s)
	}
	return ways
}

// apply puts s on fd, or leaves fd as it was.
func (sys *system) apply(fd int, s stop) error {
	if s.filter {
		return sys.attachFilter(fd, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]})
	}
	err := sys.setTTL(fd, s, maxTTL, maxTTL)
	if err != nil {
		sys.remove(fd, s)
	}
	return err
}

// remove takes s from fd, a listener or a connection that inherited it. One that
// has not inherited it is left as it is.
func (sys *system) remove(fd int, s stop) error {
	if s.filter {
		return sys.setInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	}
	return sys.setTTL(fd, s, s.ttl, s.hops)
}

// setTTL sets those of the two options that the socket has, the second also when
// the first fails.
func (sys *system) setTTL(fd int, s stop, ttl, hops int) error {
	var v4, v6 error
	if s.ttl != unknown {
		v4 = sys.setInt(fd, unix.IPPROTO_IP, unix.IP_MINTTL, ttl)
	}
	if s.hops != unknown {
		v6 = sys.setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, hops)
	}
	return cmp.Or(v4, v6)
}

// lift takes the stop from fd, the listening socket.
func (in *intake) lift(sys *system, fd int) error {
	s := in.inherited.Load()
	if s == nil {
		return nil
	}
	err := sys.remove(fd, *s)
	if s.filter && errors.Is(err, unix.ENOENT) { // another holder has taken it off
		return nil
	}
	return err
}

// clean takes from c what it may have inherited. With a minimum TTL it would hear
// nothing from its client.
func (in *intake) clean(sys *system, c *net.TCPConn) {
	s := in.inherited.Load()
	if s == nil {
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { sys.remove(int(fd), *s) })
	}
}

// A handshake is one row of sock_diag: the family, and the ports, addresses and
// interface of struct inet_diag_sockid, linux/inet_diag.h.
type handshake [1 + diagID]byte

const (
	diagFamily  = 0              // u8 idiag_family of struct inet_diag_msg
	diagSockID  = 4              // its struct inet_diag_sockid
	diagID      = 2*2 + 2*16 + 4 // without the cookie
	diagMsgSize = 72             // sizeof(struct inet_diag_msg)
	diagReqSize = 56             // sizeof(struct inet_diag_req_v2)
)

// handshakes returns the unfinished ones on a local port, of every listener in
// this network namespace. It needs no privilege (sock_diag(7)).
func (sys *system) handshakes(port int) (map[handshake]struct{}, error) {
	found := make(map[handshake]struct{})
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		rows, err := sys.diag(diagRequest(family, uint16(port)))
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if len(row) < diagMsgSize {
				return nil, unix.EBADMSG // not to be taken for no handshake
			}
			var h handshake
			h[0] = row[diagFamily]
			copy(h[1:], row[diagSockID:diagSockID+diagID])
			found[h] = struct{}{}
		}
	}
	return found, nil
}

// diagRequest asks for the sockets of a local port in SYN_RECV, which the kernel
// has in two states of its own.
func diagRequest(family uint8, port uint16) []byte {
	const synRecv, newSynRecv = 3, 12 // net/tcp_states.h
	p := make([]byte, unix.SizeofNlMsghdr+diagReqSize)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)))
	binary.NativeEndian.PutUint16(p[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(p[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	r := p[unix.SizeofNlMsghdr:]
	r[0], r[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(r[4:], 1<<synRecv|1<<newSynRecv)
	binary.BigEndian.PutUint16(r[8:], port)
	return p
}

// diag sends one request for a dump to sock_diag and returns the messages of the
// answer.
func diag(request []byte) (rows [][]byte, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// The kernel answers at once; a wait without end is not worth a drain.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return nil, err
	}
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	// No look is worth more time than the handshakes are given.
	return readDump(time.Now().Add(drainFlight), func(p []byte) (int, error) {
		n, _, err := unix.Recvfrom(fd, p, 0)
		return n, err
	})
}

// readDump reads datagrams up to the end of a dump, as long as there is time.
func readDump(until time.Time, receive func(p []byte) (int, error)) (rows [][]byte, err error) {
	p := make([]byte, 1<<16)
	for done := false; !done; {
		if time.Now().After(until) {
			return nil, unix.ETIMEDOUT
		}
		n, err := receive(p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, unix.EBADMSG // not the end, and nothing would come
		}
		var more [][]byte
		if more, done, err = parseDump(p[:n]); err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	return rows, nil
}

// parseDump takes apart one datagram of a dump, netlink(7), and copies what it
// returns. It is done at the message that ends the dump.
func parseDump(p []byte) (rows [][]byte, done bool, err error) {
	for len(p) > 0 {
		if len(p) < unix.SizeofNlMsghdr {
			return nil, false, unix.EBADMSG
		}
		size := int64(binary.NativeEndian.Uint32(p))
		if size < unix.SizeofNlMsghdr || size > int64(len(p)) {
			return nil, false, unix.EBADMSG
		}
		body := p[unix.SizeofNlMsghdr:size]
		switch binary.NativeEndian.Uint16(p[4:]) {
		case unix.NLMSG_DONE:
			return rows, true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return nil, false, unix.EBADMSG
			}
			return nil, false, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
		case unix.SOCK_DIAG_BY_FAMILY:
			rows = append(rows, append([]byte(nil), body...))
		}
		const align = unix.NLMSG_ALIGNTO - 1
		p = p[min((size+align)&^align, int64(len(p))):]
	}
	return rows, false, nil
}
