package acceptq

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
)

// Stats is the accept queue of one listener at one moment. A number that cannot
// be known is -1.
type Stats struct {
	// Queued is how many finished handshakes wait for Accept, in connections;
	// one that its client has reset still waits, on most systems.
	//
	// Linux: TCP_INFO, tcp(7). FreeBSD: SO_LISTENQLEN, getsockopt(2). macOS,
	// NetBSD, OpenBSD, DragonFly: EVFILT_READ, kqueue(2); macOS counts the
	// unfinished ones too once one is finished.
	Queued int
	// Incomplete is how many connections the kernel holds back from Queued.
	// FreeBSD: those that wait for an accept filter (SO_LISTENINCQLEN); its
	// unfinished handshakes belong to no listener. Unknown elsewhere.
	Incomplete int
	// Limit is what the kernel stored for this socket, in connections. Linux
	// and FreeBSD: read from the socket at this moment. Elsewhere: that of the
	// account, see [Listener.Backlog]; unknown to ReadStats.
	Limit int
	// Capacity is how many finished handshakes fit under that limit, see
	// [Backlog].
	Capacity int
	// Drops is how many packets this socket has thrown away instead of taking a
	// step towards a connection, since it was made. It is no count of clients:
	// each retry of a client counts, and a final ACK that meets a full queue
	// counts twice. When it rises, something is lost, but for what [Listener.Drain]
	// keeps out, and for the final ACKs that [WithDeferAccept] passes over.
	//
	// Linux: SK_MEMINFO_DROPS of SO_MEMINFO (sk_drops), 32 bits that wrap round;
	// unknown on an MPTCP socket, whose number never moves. Unknown elsewhere.
	Drops int64
}

// Utilization returns Queued as a part of Capacity: 0 is an empty queue, and at 1
// the next client is turned away. It is false when one of the two is unknown.
// Concurrent arrivals can take it a little past 1.
func (s Stats) Utilization() (part float64, known bool) {
	if s.Queued == unknown || s.Capacity <= 0 {
		return 0, false
	}
	return float64(s.Queued) / float64(s.Capacity), true
}

// String says it in one line.
func (s Stats) String() string {
	var line strings.Builder
	fmt.Fprintf(&line, "%v queued of %v", count(s.Queued), count(s.Capacity))
	if part, known := s.Utilization(); known {
		fmt.Fprintf(&line, " (%.0f%%)", 100*part)
	}
	fmt.Fprintf(&line, ", limit %v, drops %v", count(s.Limit), count(s.Drops))
	if s.Incomplete != unknown {
		fmt.Fprintf(&line, ", %d held back", s.Incomplete)
	}
	return line.String()
}

// LogValue makes a group of the numbers, for [log/slog]. A number that is
// unknown is the string "unknown".
func (s Stats) LogValue() slog.Value {
	return slog.GroupValue(
		logCount("queued", int64(s.Queued)),
		logCount("incomplete", int64(s.Incomplete)),
		logCount("limit", int64(s.Limit)),
		logCount("capacity", int64(s.Capacity)),
		logCount("drops", s.Drops),
	)
}

// MarshalJSON writes the numbers with lower-case names. One that is unknown is
// null.
func (s Stats) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Queued     count `json:"queued"`
		Incomplete count `json:"incomplete"`
		Limit      count `json:"limit"`
		Capacity   count `json:"capacity"`
		Drops      count `json:"drops"`
	}{count(s.Queued), count(s.Incomplete), count(s.Limit), count(s.Capacity), count(s.Drops)})
}

// noStats is what is known of a queue that tells nothing.
var noStats = Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown, Drops: unknown}

// Stats reads the accept queue as it is now, from the kernel: two system calls on
// Linux, three on the BSDs and macOS, and no allocation. It does not disturb
// Accept.
//
// After Close the error matches [net.ErrClosed]; on systems where nothing of the
// queue can be read it matches [errors.ErrUnsupported].
func (l *Listener) Stats() (Stats, error) {
	if !l.ok() {
		return noStats, l.opError("stats", errNotListening)
	}
	s, err := readStats(l.sys, l.raw, l.transport)
	if err != nil {
		return noStats, l.opError("stats", err)
	}
	if s.Limit == unknown {
		b := l.granted.Load()
		s.Limit, s.Capacity = b.Limit, b.Capacity
	}
	return s, nil
}

// ReadStats reads the accept queue of a listening TCP socket that any type
// holds: net.Listen's, one that systemd passed, one of another library. It
// neither copies the descriptor nor changes anything. See [Stats] for what each
// system tells.
//
// The error matches [syscall.EINVAL] if c is no listening TCP socket,
// [net.ErrClosed] if it is closed, and [errors.ErrUnsupported] on systems where
// nothing of the queue can be read.
func ReadStats(c syscall.Conn) (Stats, error) {
	if c == nil {
		return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: errNotListening}
	}
	// Its SyscallConn would note that the descriptor was shown. A type that embeds a
	// Listener has the method too.
	if l, ok := c.(interface{ itself() *Listener }); ok {
		return l.itself().Stats()
	}
	raw, err := c.SyscallConn()
	if err == nil {
		var s Stats
		if s, err = readStats(&realSystem, raw, transportUnknown); err == nil {
			return s, nil
		}
	}
	return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: cause(err)}
}

// errNotListening is the error of a socket that is no listening TCP socket, with
// the number that accept(2) has for it.
var errNotListening = fmt.Errorf("no listening TCP socket: %w", syscall.EINVAL)

// cause is the error below net's own: a method of ours that fails in a call of
// net's says so in its own name.
func cause(err error) error {
	if op, ok := err.(*net.OpError); ok {
		return op.Err
	}
	return err
}

// transport is what runs below a TCP listener: its drops can be read on plain TCP
// only.
type transport int

const (
	transportUnknown transport = iota
	plainTCP
	multipathTCP
)

// A statsReader is what one reading needs besides the descriptor. It is kept for
// the next one, and read is bound once, so that a reading allocates nothing.
type statsReader struct {
	sys       *system
	transport transport
	buffer    [64]byte
	stats     Stats
	err       error
	read      func(fd uintptr)
}

var statsReaders = sync.Pool{New: func() any {
	r := new(statsReader)
	r.read = func(fd uintptr) { r.stats, r.err = r.sys.stats(int(fd), r.transport, r.buffer[:]) }
	return r
}}

func readStats(sys *system, raw syscall.RawConn, tr transport) (Stats, error) {
	r := statsReaders.Get().(*statsReader)
	defer statsReaders.Put(r)
	r.sys, r.transport = sys, tr
	if err := raw.Control(r.read); err != nil {
		return noStats, err
	}
	return r.stats, r.err
}
