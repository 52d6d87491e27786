package acceptq

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// Stats is the state of an accept queue at one moment. -1 means unknown.
type Stats struct {
	// Queued is the number of connections that wait for Accept now. On most systems that
	// includes a connection that its client has reset.
	//   - Linux: TCP_INFO, tcp(7).
	//   - FreeBSD: SO_LISTENQLEN, getsockopt(2).
	//   - NetBSD, OpenBSD: EVFILT_READ, kqueue(2).
	//   - macOS: EVFILT_READ. If at least one handshake is finished, the number includes
	//     the unfinished handshakes.
	//   - DragonFly: EVFILT_READ. If the queue is as long as kern.ipc.soavailconn, 32 by
	//     default, or longer, the number is unknown.
	Queued int
	// Incomplete is the number of connections that the kernel holds back from Accept
	// and does not count in Queued.
	//   - FreeBSD: connections that wait for an accept filter (SO_LISTENINCQLEN).
	//     In-flight handshakes are not counted, because they belong to no listener.
	//   - Other systems: unknown. NetBSD and DragonFly have accept filters but do not
	//     report the number.
	Incomplete int
	// Limit is what the kernel stored on this socket, in connections.
	//   - Linux, FreeBSD: read from the socket at each call.
	//   - Other systems: the limit in [Listener.Backlog]. ReadStats does not know it.
	Limit int
	// Capacity is how many connections fit in the queue, see [Backlog].
	Capacity int
	// Drops is the number of packets that this socket has dropped since it was made. It
	// counts packets and not clients. On Linux it rises by one for each packet of these
	// kinds. The first two stall a client, and the others harm nobody:
	//   - a SYN that meets a full accept queue: its client sends it again after a second.
	//     A final ACK that meets one counts twice
	//   - a SYN that meets a full SYN queue, if SYN cookies are off, see [System]
	//   - a SYN that [Listener.Drain] keeps out. The client connects later or elsewhere
	//   - a SYN that the client repeats because its SYN-ACK was lost. The client connects
	//   - an RST that ends a handshake. Port scanners and the health checks of some load
	//     balancers send it
	//   - a packet that no client sends, for example with FIN, SYN and FIN, RST, or ECE
	//     and CWR
	//   - with [WithDeferAccept], the final ACK of each client
	//   - with [WithReusePort], the packet that asks a listener whether it answers, when
	//     another listener of the address drains, closes after a drain or joins
	//
	// ListenOverflows of [System] rises for the first kind, and ListenDrops for the first
	// two. An alarm needs one of them in addition to Drops, or a Queued that has reached
	// Capacity.
	//   - Linux: SK_MEMINFO_DROPS of SO_MEMINFO, which wraps at 32 bits. It is unknown
	//     on an MPTCP socket, where the kernel does not update it.
	//   - Other systems: unknown.
	Drops int64
	// Fullest is the state of the shard with the highest utilization, if [Shards.Stats]
	// has added up several. It is nil for a single queue, and also if the utilization of a
	// shard is unknown.
	Fullest *Stats
}

// Utilization returns Queued divided by Capacity. 0 is an empty queue. At 1 the queue is
// full. known is false if one of the two numbers is unknown.
//
// For the sums of several shards it returns the utilization of the fullest shard: clients
// of a full shard stall, even if all other shards are empty.
//
// A burst of clients can raise the result above 1: slightly on Linux, to 1.5 on NetBSD
// and DragonFly, and to 3 on OpenBSD.
func (s Stats) Utilization() (part float64, known bool) {
	if s.Fullest != nil {
		return s.Fullest.Utilization()
	}
	if s.Queued == unknown || s.Capacity <= 0 {
		return 0, false
	}
	return float64(s.Queued) / float64(s.Capacity), true
}

// String returns the numbers in one line. For a zero Stats, and if no number is known, it
// returns "nothing known".
func (s Stats) String() string {
	s = orNothing(s, noStats)
	if s == noStats {
		return nothingKnown
	}
	var line strings.Builder
	fmt.Fprintf(&line, "%v queued of %v", count(s.Queued), count(s.Capacity))
	if s.Fullest != nil {
		fmt.Fprintf(&line, ", fullest shard %v of %v", count(s.Fullest.Queued), count(s.Fullest.Capacity))
	}
	if part, known := s.Utilization(); known {
		fmt.Fprintf(&line, " (%.0f%%)", 100*part)
	}
	fmt.Fprintf(&line, ", limit %v, drops %v", count(s.Limit), count(s.Drops))
	if s.Incomplete != unknown {
		fmt.Fprintf(&line, ", %d held back", s.Incomplete)
	}
	return line.String()
}

// LogValue returns a group of the numbers, for [log/slog]. It omits unknown numbers.
func (s Stats) LogValue() slog.Value {
	s = orNothing(s, noStats)
	attrs := []slog.Attr{
		slog.Int("queued", s.Queued),
		slog.Int("incomplete", s.Incomplete),
		slog.Int("limit", s.Limit),
		slog.Int("capacity", s.Capacity),
		slog.Int64("drops", s.Drops),
	}
	if s.Fullest != nil {
		attrs = append(attrs, slog.Any("fullest", *s.Fullest))
	}
	return logKnown(attrs...)
}

// statsJSON is Stats in JSON.
type statsJSON struct {
	Queued     count  `json:"queued"`
	Incomplete count  `json:"incomplete"`
	Limit      count  `json:"limit"`
	Capacity   count  `json:"capacity"`
	Drops      count  `json:"drops"`
	Fullest    *Stats `json:"fullest,omitempty"`
}

func (s Stats) json() statsJSON {
	return statsJSON{count(s.Queued), count(s.Incomplete), count(s.Limit), count(s.Capacity), count(s.Drops), s.Fullest}
}

// MarshalJSON writes the numbers with lower-case names. An unknown number is null.
func (s Stats) MarshalJSON() ([]byte, error) {
	return json.Marshal(orNothing(s, noStats).json())
}

// UnmarshalJSON reads the format of MarshalJSON. A number that is null, missing or
// negative becomes unknown.
func (s *Stats) UnmarshalJSON(text []byte) error {
	j := noStats.json()
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*s = Stats{j.Queued.int(), j.Incomplete.int(), j.Limit.int(), j.Capacity.int(), int64(j.Drops), j.Fullest}
	return nil
}

// noStats is a Stats without a known number.
var noStats = Stats{Queued: unknown, Incomplete: unknown, Limit: unknown, Capacity: unknown, Drops: unknown}

// Stats reads the state of the accept queue from the kernel. It may be called
// concurrently with Accept.
//
// It makes two system calls on Linux and three on the BSDs and macOS, and it does not
// allocate. On DragonFly it makes more system calls and allocates if a connection is queued.
// On macOS, NetBSD, OpenBSD and DragonFly the call opens a kqueue(2) and closes it again. If
// the process has no descriptor left, the error matches EMFILE.
//
// After Close the error matches [net.ErrClosed]. On systems that do not report the queue
// it matches [errors.ErrUnsupported].
func (l *Listener) Stats() (Stats, error) {
	if !l.ok() {
		return noStats, l.opError("stats", sys.ErrNotListening)
	}
	s, err := readStats(l.intake.Calls, l.intake.Raw, l.transport)
	if err != nil {
		return noStats, l.opError("stats", err)
	}
	if s.Limit == unknown {
		b := l.granted.Load()
		s.Limit, s.Capacity = b.Limit, b.Capacity
	}
	return s, nil
}

// ReadStats reads the state of the accept queue of any listening TCP socket, such as a
// listener that net.Listen, systemd or another library made. It does not copy the
// descriptor or change the socket. [Stats] lists what each system reports.
//
// The error matches
//   - [syscall.EINVAL] if c is not a listening TCP socket
//   - [net.ErrClosed] if c is closed
//   - [errors.ErrUnsupported] on systems that do not report the queue
func ReadStats(c syscall.Conn) (Stats, error) {
	if c == nil {
		return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: sys.ErrNotListening}
	}
	// Listener.SyscallConn would check for duplicated descriptors, so it is avoided here.
	// A type that embeds a *Listener has the method itself too.
	if l, ok := c.(interface{ itself() *Listener }); ok {
		return l.itself().Stats()
	}
	raw, err := c.SyscallConn()
	if err == nil {
		var s Stats
		if s, err = readStats(&sys.Real, raw, transportUnknown); err == nil {
			return s, nil
		}
	}
	return noStats, &net.OpError{Op: "stats", Net: "tcp", Err: sys.Cause(err)}
}

// transport is the protocol of a listening socket. Drops can be read only on plain TCP.
type transport int

const (
	transportUnknown transport = iota
	plainTCP
	multipathTCP
)

// A reader holds what Stats and QueueTime need besides the descriptor. It is reused, and
// its functions are made only once, so that a reading does not allocate.
type reader struct {
	calls  *sys.Calls
	buffer [256]byte // for an answer of the kernel
	err    error

	transport transport
	stats     Stats
	readStats func(fd uintptr)

	waited   time.Duration
	readTime func(fd uintptr)
}

var readers = sync.Pool{New: func() any {
	r := new(reader)
	r.readStats = func(fd uintptr) { r.stats, r.err = readStatsOf(r.calls, int(fd), r.transport, r.buffer[:64]) }
	r.readTime = func(fd uintptr) { r.waited, r.err = timeInQueue(r.calls, int(fd), r.buffer[:]) }
	return r
}}

func readStats(k *sys.Calls, raw syscall.RawConn, tr transport) (Stats, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.calls, r.transport = k, tr
	if err := raw.Control(r.readStats); err != nil {
		return noStats, err
	}
	return r.stats, r.err
}
