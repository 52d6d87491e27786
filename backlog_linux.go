package acceptq

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Fields of struct tcp_info, linux/tcp.h, that the kernel fills for a listener
// (tcp_get_info in net/ipv4/tcp.c).
const (
	infoState    = 0  // u8 tcpi_state
	infoUnacked  = 24 // u32 tcpi_unacked: sk_ack_backlog, the connections queued
	infoSacked   = 28 // u32 tcpi_sacked: sk_max_ack_backlog, the limit
	infoQueueEnd = 32
)

// queue reads the accept queue of the listening socket fd. ok is false if the kernel
// refuses TCP_INFO, or if the answer does not say that the socket listens. gVisor, for
// example, fills in zeros.
func (k *kernel) queue(fd int, p []byte) (queued, limit int, ok bool) {
	n, err := k.getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil || n < infoQueueEnd || p[infoState] != tcpListen {
		return unknown, unknown, false
	}
	return connections(p[infoUnacked:]), connections(p[infoSacked:]), true
}

// connections returns a u32 of the kernel as an int, which may have 32 bits.
func connections(p []byte) int { return saturate(int64(binary.NativeEndian.Uint32(p))) }

// limit reads the limit of the listening socket fd.
func (k *kernel) limit(fd int) (limit int, ok bool) {
	var p [infoQueueEnd]byte
	_, limit, ok = k.queue(fd, p[:])
	return limit, ok
}

// SO_MEMINFO returns an array of u32, linux/sock_diag.h.
const (
	memInfoDrops = 4 * unix.SK_MEMINFO_DROPS
	memInfoEnd   = memInfoDrops + 4
)

// stats reads the accept queue of fd. p is the buffer for an answer of the kernel.
func (k *kernel) stats(fd int, tr transport, p []byte) (Stats, error) {
	s := noStats
	var ok bool
	if s.Queued, s.Limit, ok = k.queue(fd, p); !ok {
		// On gVisor TCP_INFO does not show that the socket listens.
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

// transportOf reports whether fd is MPTCP, which net.Listen uses by default, or plain TCP.
func (k *kernel) transportOf(fd int) transport {
	switch proto, err := k.getInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); {
	case err != nil:
		return transportUnknown
	case proto == unix.IPPROTO_TCP:
		return plainTCP
	}
	return multipathTCP
}
