package acceptq

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Fields of struct tcp_info, linux/tcp.h. A kernel answers with the fields that it knows.
// Every kernel that Go supports knows the first two.
const (
	infoSendMSS       = 16  // u32 tcpi_snd_mss: never 0 on Linux
	infoLastDataSent  = 44  // u32 tcpi_last_data_sent, milliseconds
	infoBytesAcked    = 120 // u64 tcpi_bytes_acked, since Linux 4.1
	infoBytesReceived = 128 // u64 tcpi_bytes_received, since Linux 4.1
	infoDataSegsOut   = 156 // u32 tcpi_data_segs_out, since Linux 4.6
	infoConnEnd       = 160
)

// timeInQueue reads how long the accepted connection fd waited. p is the buffer for the
// kernel's answer.
func (k *kernel) timeInQueue(fd int, p []byte) (time.Duration, error) {
	p = p[:infoConnEnd]
	n, err := k.getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, p)
	if err != nil {
		if proto, perr := k.getInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); perr == nil && proto != unix.IPPROTO_TCP && proto != unix.IPPROTO_MPTCP {
			return unknown, errNotTCP
		}
		return unknown, os.NewSyscallError("getsockopt", err)
	}
	return queueTimeIn(p[:max(0, min(n, len(p)))])
}

// queueTimeIn returns the time from a struct tcp_info of any length.
func queueTimeIn(info []byte) (time.Duration, error) {
	age, ok := ageIn(info)
	switch {
	case !ok:
		return unknown, errNoQueueTime
	case info[infoState] == tcpSynSent:
		return unknown, errNotJustAccepted
	// The peer has acknowledged data, the SYN of a dialed connection, or a FIN.
	case len(info) >= infoBytesAcked+8 && binary.NativeEndian.Uint64(info[infoBytesAcked:]) > 0:
		return unknown, errNotJustAccepted
	case len(info) >= infoDataSegsOut+4 && binary.NativeEndian.Uint32(info[infoDataSegsOut:]) > 0:
		return unknown, errNotJustAccepted
	}
	return age, nil
}

// ageIn returns the time since the handshake of a connection that has sent nothing. ok is
// false if the kernel does not report it. gVisor, for example, fills in zeros.
func ageIn(info []byte) (age time.Duration, ok bool) {
	if len(info) < infoLastDataSent+4 {
		return unknown, false
	}
	state := info[infoState]
	if state < tcpEstablished || state > tcpClosing || state == tcpListen || binary.NativeEndian.Uint32(info[infoSendMSS:]) == 0 {
		return unknown, false
	}
	return time.Duration(binary.NativeEndian.Uint32(info[infoLastDataSent:])) * time.Millisecond, true
}

// errNotTCP is the error for a connection of another protocol.
var errNotTCP = fmt.Errorf("not a TCP connection: %w", syscall.EINVAL)

// errNotJustAccepted is the error for a connection whose kernel clock does not measure
// the time since the end of the handshake.
var errNotJustAccepted = fmt.Errorf("the connection was dialed or has sent data; call QueueTime right after Accept: %w", syscall.EINVAL)
