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

// Stats is the accept queue of one listener at one moment. A number that cannot be
// known is -1.
type Stats struct {
	// Queued is how many finished handshakes wait for Accept, in connections. On most
	// systems a connection that its client has reset stays in the queue.
	//
	// Linux: TCP_INFO, tcp(7). FreeBSD: SO_LISTENQLEN, getsockopt(2). macOS,
	// NetBSD, OpenBSD, DragonFly: EVFILT_READ, kqueue(2). As soon as one handshake is
	// finished, macOS counts the unfinished ones too. DragonFly tells only lengths below
	// kern.ipc.soavailconn, 32 by default; a longer queue is unknown.
	Queued int
	// Incomplete is how many connections the kernel holds back from Queued. FreeBSD:
	// the connections that wait for an accept filter (SO_LISTENINCQLEN), without
	// in-flight handshakes, which belong to no listener there. Unknown elsewhere, also
	// on NetBSD and DragonFly, which have accept filters.
	Incomplete int
	// Limit is what the kernel stored for this socket, in connections. Linux and
	// FreeBSD: read from the socket now. Elsewhere: the limit in [Listener.Backlog],
	// and unknown to ReadStats.
	Limit int
	// Capacity is how many finished handshakes fit under that limit, see
	// [Backlog].
	Capacity int
	// Drops is how many packets this socket has dropped instead of taking a step
	// towards a connection, since it was made. It does not count clients: each retry of
	// a client counts, and a final ACK that meets a full queue counts twice. If Drops
	// rises, clients are delayed or lost. The exceptions are SYNs that [Listener.Drain]
	// keeps out and final ACKs that [WithDeferAccept] ignores.
	//
	// Linux: SK_MEMINFO_DROPS of SO_MEMINFO (sk_drops), which wraps at 32 bits. Unknown
	// on an MPTCP socket, whose number never changes, and on other systems.
	Drops int64
}

// Utilization returns Queued divided by Capacity: 0 is an empty queue, and at 1 the
// next client is turned away. known is false if one of the two is unknown. Clients
// that connect concurrently can take it above 1: slightly on Linux, up to 1.5 on NetBSD
// and DragonFly, up to 3 on OpenBSD.
func (s Stats) Utilization() (part float64, known bool) {
	if s.Queued == unknown || s.Capacity <= 0 {
		return 0, false
	}
	return float64(s.Queued) / float64(s.Capacity), true
}

// String returns the numbers in one line. Stats of which no number is known, such
// as a zero Stats, are "nothing known".
func (s Stats) String() string {
	s = orNothing(s, noStats)
	if s == noStats {
		return nothingKnown
	}
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

// LogValue returns a group of the numbers, for [log/slog]. An unknown number is left
// out.
func (s Stats) LogValue() slog.Value {
	s = orNothing(s, noStats)
	return logKnown(
		slog.Int("queued", s.Queued),
		slog.Int("incomplete", s.Incomplete),
		slog.Int("limit", s.Limit),
		slog.Int("capacity", s.Capacity),
		slog.Int64("drops", s.Drops),
	)
}

// statsJSON is Stats in JSON.
type statsJSON struct {
	Queued     count `json:"queued"`
	Incomplete count `json:"incomplete"`
	Limit      count `json:"limit"`
	Capacity   count `json:"capacity"`
	Drops      count `json:"drops"`
}

func (s Stats) json() statsJSON {
	return statsJSON{count(s.Queued), count(s.Incomplete), count(s.Limit), count(s.Capacity), count(s.Drops)}
}

// MarshalJSON writes the numbers with lower-case names. An unknown number is null.
func (s Stats) MarshalJSON() ([]byte, error) {
	return json.Marshal(orNothing(s, noStats).json())
}

// UnmarshalJSON reads what MarshalJSON writes. A number that is null, missing or
// negative is unknown.
func (s *Stats) UnmarshalJSON(text []byte) error {
	j := noStats.json()
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*s = Stats{j.Queued.int(), j.Incomplete.int(), j.Limit.int(), j.Capacity.int(), int64(j.Drops)}
	return nil
}

// noStats are Stats without a known number.
var noStats = Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown, Drops: unknown}

// Stats reads the current accept queue from the kernel, with two system calls on
// Linux, three on the BSDs and macOS, and without allocation. DragonFly needs more of
// both when a connection is queued. Stats may be called concurrently with Accept.
//
// On macOS, NetBSD, OpenBSD and DragonFly it opens a descriptor for a moment, a
// kqueue(2). If the process has none left, the error is EMFILE.
//
// After Close the error matches [net.ErrClosed]. On systems that tell nothing about
// the queue it matches [errors.ErrUnsupported].
func (l *Listener) Stats() (Stats, error) {
	if !l.ok() {
		return noStats, l.opError("stats", errNotListening)
	}
	s, err := readStats(l.kernel, l.raw, l.transport)
	if err != nil {
		return noStats, l.opError("stats", err)
	}
	if s.Limit == unknown {
		b := l.granted.Load()
		s.Limit, s.Capacity = b.Limit, b.Capacity
	}
	return s, nil
}

// ReadStats reads the accept queue of a listening TCP socket of any type: a listener
// of net.Listen, one that systemd passed, or one of another library. It neither
// copies the descriptor nor changes the socket. See [Stats] for what each system
// tells.
//
// The error matches [syscall.EINVAL] if c is not a listening TCP socket,
// [net.ErrClosed] if it is closed, and [errors.ErrUnsupported] on systems that tell
// nothing about the queue.
func ReadStats(c syscall.Conn) (Stats, error) {
	if c == nil {
		return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: errNotListening}
	}
	// Its SyscallConn would look for duplicates. A type that embeds a Listener has the
	// method too.
	if l, ok := c.(interface{ itself() *Listener }); ok {
		return l.itself().Stats()
	}
	raw, err := c.SyscallConn()
	if err == nil {
		var s Stats
		if s, err = readStats(&realKernel, raw, transportUnknown); err == nil {
			return s, nil
		}
	}
	return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: cause(err)}
}

// errNotListening is the error of a socket that is not a listening TCP socket, with
// the number that accept(2) has for it.
var errNotListening = fmt.Errorf("not a listening TCP socket: %w", syscall.EINVAL)

// cause is the error inside an error of net's. A method that calls net reports it with
// its own Op.
func cause(err error) error {
	if op, ok := err.(*net.OpError); ok {
		return op.Err
	}
	return err
}

// transport is the protocol of a listening socket. Drops can be read on plain TCP
// only.
type transport int

const (
	transportUnknown transport = iota
	plainTCP
	multipathTCP
)

// A statsReader holds what a reading needs besides the descriptor. It is kept for the
// next reading, and read is bound once, so that a reading does not allocate.
type statsReader struct {
	kernel    *kernel
	transport transport
	buffer    [64]byte
	stats     Stats
	err       error
	read      func(fd uintptr)
}

var statsReaders = sync.Pool{New: func() any {
	r := new(statsReader)
	r.read = func(fd uintptr) { r.stats, r.err = r.kernel.stats(int(fd), r.transport, r.buffer[:]) }
	return r
}}

func readStats(k *kernel, raw syscall.RawConn, tr transport) (Stats, error) {
	r := statsReaders.Get().(*statsReader)
	defer statsReaders.Put(r)
	r.kernel, r.transport = k, tr
	if err := raw.Control(r.read); err != nil {
		return noStats, err
	}
	return r.stats, r.err
}
