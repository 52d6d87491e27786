package acceptq

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// struct tcp_info of linux/tcp.h, as far as a listener fills it: tcpi_state,
// and for a socket in that state of 10 its queue (tcp_get_info in net/ipv4/tcp.c).
const (
	infoState    = 0  // u8 tcpi_state
	infoUnacked  = 24 // u32 tcpi_unacked: sk_ack_backlog, the connections queued
	infoSacked   = 28 // u32 tcpi_sacked: sk_max_ack_backlog, the limit
	infoQueueEnd = 32
)

// queue reads the accept queue of the listening socket fd. It is not ok where
// TCP_INFO is refused, or is answered as if the socket did not listen: gVisor
// fills it with zeros.
func (k *kernel) queue(fd int, p []byte) (queued, limit int, ok bool) {
	n, err := k.getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil || n < infoQueueEnd || p[infoState] != tcpListen {
		return unknown, unknown, false
	}
	return connections(p[infoUnacked:]), connections(p[infoSacked:]), true
}

// connections is a u32 of the kernel's as an int, which may have 32 bits itself.
func connections(p []byte) int { return saturate(int64(binary.NativeEndian.Uint32(p))) }

// limit reads the limit of the listening socket fd.
func (k *kernel) limit(fd int) (limit int, ok bool) {
	var p [infoQueueEnd]byte
	_, limit, ok = k.queue(fd, p[:])
	return limit, ok
}

// SO_MEMINFO answers with the u32s of linux/sock_diag.h.
const (
	memInfoDrops = 4 * unix.SK_MEMINFO_DROPS
	memInfoEnd   = memInfoDrops + 4
)

// stats reads the accept queue of fd; p is room for one answer of the kernel.
func (k *kernel) stats(fd int, tr transport, p []byte) (Stats, error) {
	s := noStats
	var ok bool
	if s.Queued, s.Limit, ok = k.queue(fd, p); !ok {
		// TCP_INFO of a listener that does not say so is gVisor's.
		if err := k.mustListen(fd); err != nil {
			return noStats, err
		}
	}
	r := hostRule()
	s.Capacity = r.capacity(s.Limit)
	if tr == transportUnknown {
		tr = k.transportOf(fd)
	}
	if tr == plainTCP {
		if n, err := k.getsockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, p); err == nil && n >= memInfoEnd {
			s.Drops = int64(binary.NativeEndian.Uint32(p[memInfoDrops:]))
		}
	}
	return s, nil
}

// transportOf tells MPTCP, which net.Listen uses by default, from plain TCP.
func (k *kernel) transportOf(fd int) transport {
	switch proto, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); {
	case err != nil:
		return transportUnknown
	case proto == unix.IPPROTO_TCP:
		return plainTCP
	}
	return multipathTCP
}
