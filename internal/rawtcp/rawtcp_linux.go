package rawtcp

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of a TCP header.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// A Wire sends and receives segments of the network 10.0.0.0/8. Use it from one goroutine.
type Wire struct {
	send, receive int
	packet        [1 << 16]byte
}

// Open returns a Wire for the calling thread's network namespace. It adds a route for
// 10.0.0.0/8 there.
func Open() (w *Wire, err error) {
	w = &Wire{send: -1, receive: -1}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if w.send, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err = addRoute(w.send); err != nil {
		return nil, err
	}
	const ipv4 = unix.ETH_P_IP<<8&0xff00 | unix.ETH_P_IP>>8 // in network byte order
	if w.receive, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, ipv4); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	wait := unix.Timeval{Usec: 200_000}
	return w, os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(w.receive, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait))
}

// addRoute sends the answers to 10.0.0.0/8 back into the loopback interface. The kernel
// drops them there, because no interface has their destination.
func addRoute(fd int) error {
	sockaddr := func(a, b, c, d byte) (s unix.RawSockaddr) {
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s))
		in.Family, in.Addr = unix.AF_INET, [4]byte{a, b, c, d}
		return s
	}
	name := [...]byte{'l', 'o', 0}
	// struct rtentry, linux/route.h
	entry := struct {
		pad1               uintptr
		dst, gateway, mask unix.RawSockaddr
		flags              uint16
		pad2               int16
		pad3               uintptr
		pad4               uintptr
		metric             int16
		dev                *byte
		mtu, window        uintptr
		irtt               uint16
	}{dst: sockaddr(10, 0, 0, 0), gateway: sockaddr(0, 0, 0, 0), mask: sockaddr(255, 0, 0, 0), flags: unix.RTF_UP, dev: &name[0]}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&entry)))
	if errno != 0 && errno != unix.EEXIST {
		return os.NewSyscallError("ioctl SIOCADDRT", errno)
	}
	return nil
}

// Close closes w. The route stays.
func (w *Wire) Close() {
	for _, fd := range []int{w.send, w.receive} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// A Segment is a TCP segment without data or options.
type Segment struct {
	From, To netip.AddrPort
	Seq, Ack uint32
	Flags    uint8
}

// Send sends s, whose To is an IPv4 address of the loopback interface.
func (w *Wire) Send(s Segment) error {
	p := make([]byte, 40)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP // the kernel sets the length and the checksum
	from, to := s.From.Addr().As4(), s.To.Addr().As4()
	copy(p[12:], from[:])
	copy(p[16:], to[:])
	tcp := p[20:]
	binary.BigEndian.PutUint16(tcp[0:], s.From.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.To.Port())
	binary.BigEndian.PutUint32(tcp[4:], s.Seq)
	binary.BigEndian.PutUint32(tcp[8:], s.Ack)
	tcp[12], tcp[13] = 5<<4, s.Flags
	binary.BigEndian.PutUint16(tcp[14:], 65535)
	sum := uint32(unix.IPPROTO_TCP) + uint32(len(tcp))
	for i := 12; i < len(p); i += 2 { // the addresses of the pseudo-header, and the segment
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	return os.NewSyscallError("sendto", unix.Sendto(w.send, p, 0, &unix.SockaddrInet4{Addr: to}))
}

// Answer returns the next segment from the address from to the address to. ok is false if
// none has come for a fifth of a second.
func (w *Wire) Answer(from, to netip.AddrPort) (s Segment, ok bool, err error) {
	for {
		n, _, err := unix.Recvfrom(w.receive, w.packet[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return s, false, nil
		case err != nil:
			return s, false, os.NewSyscallError("recvfrom", err)
		}
		p := w.packet[:n]
		if n < 40 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP || n < int(p[0]&15)*4+20 {
			continue
		}
		tcp := p[int(p[0]&15)*4:]
		s = Segment{
			From:  netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[12:])), binary.BigEndian.Uint16(tcp)),
			To:    netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[16:])), binary.BigEndian.Uint16(tcp[2:])),
			Seq:   binary.BigEndian.Uint32(tcp[4:]),
			Ack:   binary.BigEndian.Uint32(tcp[8:]),
			Flags: tcp[13],
		}
		if s.From == from && s.To == to {
			return s, true, nil
		}
	}
}

// HalfOpen does what a health check or a port scanner does that sends SYN and, when it has
// the SYN-ACK, RST. It reports whether the server has answered.
func (w *Wire) HalfOpen(from, to netip.AddrPort) (answered bool, err error) {
	if err := w.Send(Segment{From: from, To: to, Seq: 1, Flags: SYN}); err != nil {
		return false, err
	}
	s, ok, err := w.Answer(to, from)
	if err != nil || !ok || s.Flags != SYN|ACK {
		return false, err
	}
	return true, w.Send(Segment{From: from, To: to, Seq: s.Ack, Flags: RST})
}
