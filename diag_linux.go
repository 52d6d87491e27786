package acceptq

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// This file is a client of sock_diag(7), the netlink interface that lists the sockets of
// the calling thread's network namespace. It needs no privilege, and it knows no Listener.

// A diagRequest selects TCP sockets.
type diagRequest struct {
	family     uint8  // AF_INET or AF_INET6
	port       uint16 // the local port; 0 selects every port
	states     uint32 // a set of bits: 1<<tcpListen selects listeners
	extensions uint8  // the attributes to request; bit n-1 requests attribute n
}

// A socketID identifies a TCP socket that is not a listener, for as long as it exists.
type socketID struct {
	family        uint8
	local, client netip.AddrPort // without IPv4-mapped addresses
	device        uint32         // the interface that the socket is bound to; 0 if there is none
}

// A row is one socket as sock_diag lists it.
type row struct {
	socketID
	state uint8
	// For a listener, rqueue is the number of queued connections, and wqueue is the limit.
	// For other sockets they are bytes.
	rqueue, wqueue uint32
	uid, inode     uint32
	cookie         uint64 // unique for each socket
	v6only         bool   // an IPv6 listener that IPv4 clients cannot use
	info           []byte // struct tcp_info; nil if the row has none
}

// Fields of struct inet_diag_msg and its struct inet_diag_sockid, linux/inet_diag.h.
const (
	diagFamily    = 0  // u8 idiag_family
	diagState     = 1  // u8 idiag_state
	diagLocal     = 4  // be16 idiag_sport
	diagClient    = 6  // be16 idiag_dport
	diagSource    = 8  // be32 idiag_src[4]
	diagDest      = 24 // be32 idiag_dst[4]
	diagInterface = 40 // u32 idiag_if
	diagCookie    = 44 // u32 idiag_cookie[2]
	diagRqueue    = 56 // u32 idiag_rqueue
	diagWqueue    = 60 // u32 idiag_wqueue
	diagUID       = 64 // u32 idiag_uid
	diagInode     = 68 // u32 idiag_inode
	diagMsgSize   = 72 // sizeof(struct inet_diag_msg)
	diagReqSize   = 56 // sizeof(struct inet_diag_req_v2)
)

// Attributes of a row, linux/inet_diag.h.
const (
	diagInfo     = 2  // INET_DIAG_INFO, a struct tcp_info; only if requested
	diagSKV6Only = 11 // INET_DIAG_SKV6ONLY, a u8; each IPv6 listener has it
)

// Socket states of net/tcp_states.h. An in-flight handshake has the state tcpNewSynRecv,
// or tcpSynRecv if it is a fast-open connection. In a row it is always tcpSynRecv.
const (
	tcpEstablished = 1
	tcpSynSent     = 2
	tcpSynRecv     = 3
	tcpCloseWait   = 8
	tcpListen      = 10
	tcpClosing     = 11
	tcpNewSynRecv  = 12
)

// dump asks the kernel for the sockets that r selects, and returns those for which keep
// returns true. The info of the row that keep gets is valid only during the call. So rows
// that are not kept need no memory.
//
// dump checks ctx before each datagram of the answer.
func (k *kernel) dump(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
	answer, err := k.diag(r.message())
	if err != nil {
		return nil, err
	}
	defer answer.close()
	return readDump(ctx, keep, answer.receive)
}

// message returns the netlink message of r: a header and a struct inet_diag_req_v2.
func (r diagRequest) message() []byte {
	p := make([]byte, unix.SizeofNlMsghdr+diagReqSize)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)))
	binary.NativeEndian.PutUint16(p[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(p[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := p[unix.SizeofNlMsghdr:]
	body[0], body[1], body[2] = r.family, unix.IPPROTO_TCP, r.extensions
	binary.NativeEndian.PutUint32(body[4:], r.states)
	binary.BigEndian.PutUint16(body[8:], r.port)
	return p
}

// readDump reads datagrams up to the end of a dump, or until ctx ends.
func readDump(ctx context.Context, keep func(row) bool, receive func(p []byte) (int, error)) (rows []row, err error) {
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
		done, err = parseDump(p[:n], func(r row) {
			if keep(r) {
				r.info = bytes.Clone(r.info)
				rows = append(rows, r)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return rows, nil
}

// parseDump parses one datagram of a dump, netlink(7), and calls found for each row. done
// reports whether the datagram ends the dump.
func parseDump(p []byte, found func(row)) (done bool, err error) {
	for len(p) > 0 {
		if len(p) < unix.SizeofNlMsghdr {
			return false, unix.EBADMSG
		}
		size := int64(binary.NativeEndian.Uint32(p))
		if size < unix.SizeofNlMsghdr || size > int64(len(p)) {
			return false, unix.EBADMSG
		}
		body := p[unix.SizeofNlMsghdr:size]
		switch binary.NativeEndian.Uint16(p[4:]) {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, unix.EBADMSG
			}
			return false, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
		case unix.SOCK_DIAG_BY_FAMILY:
			r, err := parseRow(body)
			if err != nil {
				return false, err
			}
			found(r)
		}
		const align = unix.NLMSG_ALIGNTO - 1
		p = p[min((size+align)&^align, int64(len(p))):]
	}
	return false, nil
}

// parseRow parses a struct inet_diag_msg and the attributes that follow it. The info of
// the row is a part of p. A row that is too short is an error, because it must not count
// as no socket.
func parseRow(p []byte) (r row, err error) {
	if len(p) < diagMsgSize {
		return row{}, unix.EBADMSG
	}
	number := func(offset int) uint32 { return binary.NativeEndian.Uint32(p[offset:]) }
	address := func(ip, port int) netip.AddrPort {
		addr := netip.AddrFrom16([16]byte(p[ip:]))
		if p[diagFamily] == unix.AF_INET {
			addr = netip.AddrFrom4([4]byte(p[ip:]))
		}
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(p[port:]))
	}
	r = row{
		socketID: socketID{
			family: p[diagFamily],
			local:  address(diagSource, diagLocal),
			client: address(diagDest, diagClient),
			device: number(diagInterface),
		},
		state:  p[diagState],
		rqueue: number(diagRqueue),
		wqueue: number(diagWqueue),
		uid:    number(diagUID),
		inode:  number(diagInode),
		cookie: binary.NativeEndian.Uint64(p[diagCookie:]),
	}
	for p = p[diagMsgSize:]; len(p) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(p))
		if size < unix.SizeofNlAttr || size > len(p) {
			return row{}, unix.EBADMSG
		}
		switch value := p[unix.SizeofNlAttr:size]; binary.NativeEndian.Uint16(p[2:]) {
		case diagInfo:
			r.info = value
		case diagSKV6Only:
			r.v6only = len(value) > 0 && value[0] != 0
		}
		const align = unix.NLA_ALIGNTO - 1
		p = p[min((size+align)&^align, len(p)):]
	}
	return r, nil
}
