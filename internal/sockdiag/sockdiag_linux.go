package sockdiag

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// This file is a client of sock_diag(7), the netlink interface that lists the sockets of
// the calling thread's network namespace. It needs no privilege, and it knows no Listener.

// A Request selects TCP sockets.
type Request struct {
	Family     uint8  // AF_INET or AF_INET6
	Port       uint16 // the local port; 0 selects every port
	States     uint32 // a set of bits: 1<<tcpinfo.Listen selects listeners
	Extensions uint8  // the attributes to request; bit n-1 requests attribute n
}

// A SocketID identifies a TCP socket that is not a listener, for as long as it exists.
type SocketID struct {
	Family        uint8
	Local, Client netip.AddrPort // without IPv4-mapped addresses
	Device        uint32         // the interface that the socket is bound to; 0 if there is none
}

// A Row is one socket as sock_diag lists it.
type Row struct {
	SocketID
	State uint8
	// For a listener, rqueue is the number of queued connections, and wqueue is the limit.
	// For other sockets they are bytes.
	Rqueue, Wqueue uint32
	UID, Inode     uint32
	Cookie         uint64 // unique for each socket
	V6Only         bool   // an IPv6 listener that IPv4 clients cannot use
	Drops          int64  // sk_drops, the packets that the socket has dropped; -1 if the row has none
	Info           []byte // struct tcp_info; nil if the row has none
}

// Fields of struct inet_diag_msg and its struct inet_diag_sockid, linux/inet_diag.h.
const (
	DiagFamily    = 0  // u8 idiag_family
	DiagState     = 1  // u8 idiag_state
	diagLocal     = 4  // be16 idiag_sport
	DiagClient    = 6  // be16 idiag_dport
	DiagSource    = 8  // be32 idiag_src[4]
	DiagDest      = 24 // be32 idiag_dst[4]
	diagInterface = 40 // u32 idiag_if
	DiagCookie    = 44 // u32 idiag_cookie[2]
	diagRqueue    = 56 // u32 idiag_rqueue
	diagWqueue    = 60 // u32 idiag_wqueue
	diagUID       = 64 // u32 idiag_uid
	DiagInode     = 68 // u32 idiag_inode
	DiagMsgSize   = 72 // sizeof(struct inet_diag_msg)
	diagReqSize   = 56 // sizeof(struct inet_diag_req_v2)
)

// Attributes of a row, linux/inet_diag.h.
const (
	DiagInfo     = 2  // INET_DIAG_INFO, a struct tcp_info; only if requested
	DiagMemInfo  = 7  // INET_DIAG_SKMEMINFO, the numbers of SO_MEMINFO; only if requested
	diagSKV6Only = 11 // INET_DIAG_SKV6ONLY, a u8; each IPv6 listener has it
)

// Dump asks the kernel for the sockets that r selects, and returns those for which keep
// returns true. The info of the row that keep gets is valid only during the call. So rows
// that are not kept need no memory.
//
// dump checks ctx before each datagram of the answer.
func Dump(k *sys.Calls, ctx context.Context, r Request, keep func(Row) bool) ([]Row, error) {
	answer, err := k.Diag(r.message())
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	return readDump(ctx, keep, answer.Receive)
}

// message returns the netlink message of r: a header and a struct inet_diag_req_v2.
func (r Request) message() []byte {
	p := make([]byte, unix.SizeofNlMsghdr+diagReqSize)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)))
	binary.NativeEndian.PutUint16(p[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(p[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := p[unix.SizeofNlMsghdr:]
	body[0], body[1], body[2] = r.Family, unix.IPPROTO_TCP, r.Extensions
	binary.NativeEndian.PutUint32(body[4:], r.States)
	binary.BigEndian.PutUint16(body[8:], r.Port)
	return p
}

// readDump reads datagrams up to the end of a dump, or until ctx ends.
func readDump(ctx context.Context, keep func(Row) bool, receive func(p []byte) (int, error)) (rows []Row, err error) {
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
		done, err = parseDump(p[:n], func(r Row) {
			if keep(r) {
				r.Info = bytes.Clone(r.Info)
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
func parseDump(p []byte, found func(Row)) (done bool, err error) {
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
			// The kernel reports the failure of a dump here: -ENOENT without the module
			// tcp_diag. No socket has been listed then, which does not mean that there is none.
			if len(body) < 4 {
				return false, unix.EBADMSG
			}
			if n := int32(binary.NativeEndian.Uint32(body)); n < 0 {
				return false, failure(unix.Errno(-n))
			}
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, unix.EBADMSG
			}
			return false, failure(unix.Errno(-int32(binary.NativeEndian.Uint32(body))))
		case unix.SOCK_DIAG_BY_FAMILY:
			r, err := ParseRow(body)
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

// failure returns the error of an answer. The kernel answers ENOENT if it cannot load the module
// that lists TCP sockets.
func failure(err unix.Errno) error {
	if err == unix.ENOENT {
		return fmt.Errorf("the kernel cannot list TCP sockets, load the module tcp_diag: %w (%w)", errors.ErrUnsupported, err)
	}
	return err
}

// ParseRow parses a struct inet_diag_msg and the attributes that follow it. The info of
// the row is a part of p. A row that is too short is an error, because it must not count
// as no socket.
func ParseRow(p []byte) (r Row, err error) {
	if len(p) < DiagMsgSize {
		return Row{}, unix.EBADMSG
	}
	number := func(offset int) uint32 { return binary.NativeEndian.Uint32(p[offset:]) }
	address := func(ip, port int) netip.AddrPort {
		addr := netip.AddrFrom16([16]byte(p[ip:]))
		if p[DiagFamily] == unix.AF_INET {
			addr = netip.AddrFrom4([4]byte(p[ip:]))
		}
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(p[port:]))
	}
	r = Row{
		SocketID: SocketID{
			Family: p[DiagFamily],
			Local:  address(DiagSource, diagLocal),
			Client: address(DiagDest, DiagClient),
			Device: number(diagInterface),
		},
		State:  p[DiagState],
		Rqueue: number(diagRqueue),
		Wqueue: number(diagWqueue),
		UID:    number(diagUID),
		Inode:  number(DiagInode),
		Cookie: binary.NativeEndian.Uint64(p[DiagCookie:]),
		Drops:  sys.Unknown,
	}
	for p = p[DiagMsgSize:]; len(p) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(p))
		if size < unix.SizeofNlAttr || size > len(p) {
			return Row{}, unix.EBADMSG
		}
		switch value := p[unix.SizeofNlAttr:size]; binary.NativeEndian.Uint16(p[2:]) {
		case DiagInfo:
			r.Info = value
		case DiagMemInfo:
			if len(value) >= sys.MemInfoEnd {
				r.Drops = int64(binary.NativeEndian.Uint32(value[sys.MemInfoDrops:]))
			}
		case diagSKV6Only:
			r.V6Only = len(value) > 0 && value[0] != 0
		}
		const align = unix.NLA_ALIGNTO - 1
		p = p[min((size+align)&^align, len(p)):]
	}
	return r, nil
}
