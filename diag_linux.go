package acceptq

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// This file is a client of sock_diag(7), the netlink interface that lists the
// sockets of a network namespace. It needs no privilege.

// A handshake identifies an in-flight handshake: the family, and the ports, addresses and
// interface of struct inet_diag_sockid, linux/inet_diag.h.
type handshake [1 + diagID]byte

const (
	diagFamily  = 0              // u8 idiag_family of struct inet_diag_msg
	diagSockID  = 4              // its struct inet_diag_sockid
	diagID      = 2*2 + 2*16 + 4 // without the cookie
	diagState   = 1              // u8 idiag_state
	diagLocal   = 4              // be16 idiag_sport
	diagClient  = 6              // be16 idiag_dport
	diagDest    = 24             // idiag_dst
	diagCookie  = 44             // u32 idiag_cookie[2]
	diagMsgSize = 72             // sizeof(struct inet_diag_msg)
	diagReqSize = 56             // sizeof(struct inet_diag_req_v2)
)

// Socket states of net/tcp_states.h. An in-flight handshake has the state tcpNewSynRecv,
// or tcpSynRecv if it is a fast-open connection.
const (
	tcpSynRecv    = 3
	tcpListen     = 10
	tcpNewSynRecv = 12
)

// handshakes returns the in-flight handshakes on a local port, for all listeners in the
// calling thread's network namespace.
func (k *kernel) handshakes(ctx context.Context, families []uint8, port int) (map[handshake]struct{}, error) {
	found := make(map[handshake]struct{})
	for _, family := range families {
		rows, err := k.diag(ctx, diagRequest(family, port, 1<<tcpSynRecv|1<<tcpNewSynRecv))
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if len(row) < diagMsgSize {
				return nil, unix.EBADMSG // a short row must not count as no handshake
			}
			var h handshake
			h[0] = row[diagFamily]
			copy(h[1:], row[diagSockID:diagSockID+diagID])
			found[h] = struct{}{}
		}
	}
	return found, nil
}

// diagRequest returns a request for the sockets on a local port whose state is in states,
// a set of bits.
func diagRequest(family uint8, port int, states uint32) []byte {
	return diagRequestWith(family, port, states, 0)
}

// diagRequestWith is like diagRequest and also requests attributes. Bit n-1 of extensions
// requests attribute n.
func diagRequestWith(family uint8, port int, states uint32, extensions uint8) []byte {
	p := make([]byte, unix.SizeofNlMsghdr+diagReqSize)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)))
	binary.NativeEndian.PutUint16(p[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(p[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	r := p[unix.SizeofNlMsghdr:]
	r[0], r[1], r[2] = family, unix.IPPROTO_TCP, extensions
	binary.NativeEndian.PutUint32(r[4:], states)
	binary.BigEndian.PutUint16(r[8:], uint16(port))
	return p
}

// diagWait is how long a read of the answer may block before ctx is checked.
const diagWait = 100 * time.Millisecond

// diag requests all rows for a drain. It stops after drainFlight, because a drain does not
// wait longer for in-flight handshakes.
func diag(ctx context.Context, request []byte) (rows [][]byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, drainFlight)
	defer cancel()
	return diagSome(ctx, request, func([]byte) bool { return true })
}

// diagSome sends one dump request to sock_diag and returns the rows for which keep returns
// true. It checks ctx before each datagram of the answer.
func diagSome(ctx context.Context, request []byte, keep func(row []byte) bool) (rows [][]byte, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(diagWait.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return nil, err
	}
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	return readDump(ctx, keep, func(p []byte) (int, error) {
		n, _, err := unix.Recvfrom(fd, p, 0)
		return n, err
	})
}

// readDump reads datagrams up to the end of a dump, or until ctx ends.
func readDump(ctx context.Context, keep func(row []byte) bool, receive func(p []byte) (int, error)) (rows [][]byte, err error) {
	p := make([]byte, 1<<16)
	for done := false; !done; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := receive(p)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, unix.EBADMSG // an empty datagram does not end a dump
		}
		var more [][]byte
		if more, done, err = parseDump(p[:n]); err != nil {
			return nil, err
		}
		for _, row := range more {
			if keep(row) {
				rows = append(rows, row)
			}
		}
	}
	return rows, nil
}

// parseDump parses one datagram of a dump, netlink(7). The rows are copies. done reports
// whether the datagram ends the dump.
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

// A member is one listener of a port, as sock_diag lists it. If two members have the
// option SO_REUSEPORT and equal groups, they are in one SO_REUSEPORT group.
type member struct {
	inode uint32
	group group
}

type group struct {
	family uint8
	v6only uint8
	addr   [16]byte
	device uint32
	uid    uint32
}

const (
	diagSource    = diagSockID + 2*2 // __be32 idiag_src[4]
	diagInterface = diagSockID + 36  // __u32 idiag_if
	diagUID       = 64               // __u32 idiag_uid
	diagInode     = 68               // __u32 idiag_inode
	diagSKV6Only  = 11               // INET_DIAG_SKV6ONLY, a u8
)

// listeners lists the listeners on the port and family of l, in the order of their
// listen(2). For IPv4 the kernel lists the newest first.
func (k *kernel) listeners(ctx context.Context, l *Listener) (all []member, err error) {
	addr := l.Addr().(*net.TCPAddr)
	family := uint8(unix.AF_INET6)
	if addr.IP.To4() != nil {
		family = unix.AF_INET
	}
	rows, err := k.diag(ctx, diagRequest(family, addr.Port, 1<<tcpListen))
	if err != nil {
		return nil, err
	}
	for _, row := range rows {
		r, err := parseMember(row)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	if family == unix.AF_INET {
		slices.Reverse(all)
	}
	return all, nil
}

// groupOf returns the inodes of the group of l in the order of listen(2).
func (k *kernel) groupOf(ctx context.Context, l *Listener, inode uint32) (inodes []uint32, err error) {
	rows, err := k.listeners(ctx, l)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(rows, func(r member) bool { return r.inode == inode })
	if i < 0 {
		return nil, errors.New("sock_diag does not list the listener")
	}
	for _, r := range rows {
		if r.group == rows[i].group {
			inodes = append(inodes, r.inode)
		}
	}
	return inodes, nil
}

// parseMember parses a row of sock_diag: a struct inet_diag_msg followed by attributes.
func parseMember(row []byte) (r member, err error) {
	if len(row) < diagMsgSize {
		return r, unix.EBADMSG
	}
	r.inode = binary.NativeEndian.Uint32(row[diagInode:])
	r.group.family = row[diagFamily]
	copy(r.group.addr[:], row[diagSource:])
	r.group.device = binary.NativeEndian.Uint32(row[diagInterface:])
	r.group.uid = binary.NativeEndian.Uint32(row[diagUID:])
	v6only, err := attribute(row, diagSKV6Only)
	if len(v6only) > 0 {
		r.group.v6only = v6only[0]
	}
	return r, err
}

// A diagRow is one socket as sock_diag lists it.
type diagRow struct {
	state         uint8
	local, client netip.AddrPort
	iface         uint32 // the device that the socket is bound to; 0 if it is not bound
	cookie        uint64 // unique for each socket
	inode         uint32
	info          []byte // struct tcp_info; nil if the row has none
}

const diagInfo = 2 // INET_DIAG_INFO, the attribute that holds a struct tcp_info

// parseRow parses a struct inet_diag_msg and the attributes behind it.
func parseRow(p []byte) (row diagRow, err error) {
	if len(p) < diagMsgSize {
		return row, unix.EBADMSG
	}
	row = diagRow{
		state:  p[diagState],
		iface:  binary.NativeEndian.Uint32(p[diagInterface:]),
		cookie: binary.NativeEndian.Uint64(p[diagCookie:]),
		inode:  binary.NativeEndian.Uint32(p[diagInode:]),
	}
	address := func(ip, port []byte) netip.AddrPort {
		addr := netip.AddrFrom16([16]byte(ip))
		if p[diagFamily] == unix.AF_INET {
			addr = netip.AddrFrom4([4]byte(ip))
		}
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(port))
	}
	row.local = address(p[diagSource:], p[diagLocal:])
	row.client = address(p[diagDest:], p[diagClient:])
	if row.info, err = attribute(p, diagInfo); err != nil {
		return diagRow{}, err
	}
	return row, nil
}

// attribute returns the value of an attribute that follows a struct inet_diag_msg. It
// returns nil if the row does not have the attribute.
func attribute(row []byte, kind uint16) (value []byte, err error) {
	for p := row[diagMsgSize:]; len(p) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(p))
		if size < unix.SizeofNlAttr || size > len(p) {
			return nil, unix.EBADMSG
		}
		if binary.NativeEndian.Uint16(p[2:]) == kind {
			value = p[unix.SizeofNlAttr:size]
		}
		const align = unix.NLA_ALIGNTO - 1
		p = p[min((size+align)&^align, len(p)):]
	}
	return value, nil
}
