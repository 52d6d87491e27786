// Package tcpinfo reads the fields of struct tcp_info, linux/tcp.h, that this module needs. A
// kernel answers with the fields that it knows, so each field is checked against the length of
// the answer. It makes no system call and knows no socket.
package tcpinfo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// Fields of struct tcp_info, linux/tcp.h, that the kernel fills for a listener
// (tcp_get_info in net/ipv4/tcp.c).
const (
	State    = 0  // u8 tcpi_state
	Unacked  = 24 // u32 tcpi_unacked: sk_ack_backlog, the connections queued
	Sacked   = 28 // u32 tcpi_sacked: sk_max_ack_backlog, the limit
	QueueEnd = 32
)

// Socket states of net/tcp_states.h. An in-flight handshake has the state NewSynRecv,
// or SynRecv if it is a fast-open connection. In a row it is always SynRecv.
const (
	Established = 1
	SynSent     = 2
	SynRecv     = 3
	CloseWait   = 8
	Listen      = 10
	Closing     = 11
	NewSynRecv  = 12
)

// ErrNoQueueTime is the error if the kernel does not report the time.
var ErrNoQueueTime = fmt.Errorf("this system does not report the time in the accept queue: %w", errors.ErrUnsupported)

// Fields of struct tcp_info, linux/tcp.h. A kernel answers with the fields that it knows.
// Every kernel that Go supports knows the first two.
const (
	SendMSS       = 16  // u32 tcpi_snd_mss: never 0 on Linux
	LastDataSent  = 44  // u32 tcpi_last_data_sent, milliseconds
	BytesAcked    = 120 // u64 tcpi_bytes_acked, since Linux 4.1
	BytesReceived = 128 // u64 tcpi_bytes_received, since Linux 4.1
	DataSegsOut   = 156 // u32 tcpi_data_segs_out, since Linux 4.6
	ConnEnd       = 160
)

// QueueTime returns the time from a struct tcp_info of any length.
func QueueTime(info []byte) (time.Duration, error) {
	age, ok := Age(info)
	switch {
	case !ok:
		return sys.Unknown, ErrNoQueueTime
	case info[State] == SynSent:
		return sys.Unknown, ErrNotJustAccepted
	// The peer has acknowledged data, the SYN of a dialed connection, or a FIN.
	case len(info) >= BytesAcked+8 && binary.NativeEndian.Uint64(info[BytesAcked:]) > 0:
		return sys.Unknown, ErrNotJustAccepted
	case len(info) >= DataSegsOut+4 && binary.NativeEndian.Uint32(info[DataSegsOut:]) > 0:
		return sys.Unknown, ErrNotJustAccepted
	}
	return age, nil
}

// Age returns the time since the handshake of a connection that has sent nothing. ok is
// false if the kernel does not report it. gVisor, for example, fills in zeros.
func Age(info []byte) (age time.Duration, ok bool) {
	if len(info) < LastDataSent+4 {
		return sys.Unknown, false
	}
	state := info[State]
	if state < Established || state > Closing || state == Listen || binary.NativeEndian.Uint32(info[SendMSS:]) == 0 {
		return sys.Unknown, false
	}
	return time.Duration(binary.NativeEndian.Uint32(info[LastDataSent:])) * time.Millisecond, true
}

// ErrNotJustAccepted is the error for a connection whose kernel clock does not measure
// the time since the end of the handshake.
var ErrNotJustAccepted = fmt.Errorf("the connection was dialed or has sent data; call QueueTime right after Accept: %w", syscall.EINVAL)
