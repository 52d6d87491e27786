package acceptq

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"strings"

	"github.com/acceptq/acceptq/internal/sys"
)

// errNoRule is the error on a system whose ceiling the package cannot read.
var errNoRule = fmt.Errorf("the ceiling of this system is unknown: %w", errors.ErrUnsupported)

// System holds the system-wide settings and counters for listening sockets. -1 means
// that a number is unknown or that the system does not have it.
//   - Linux: the numbers of the calling thread's network namespace.
//   - FreeBSD: the numbers of the machine, or of the jail if it has its own network
//     stack. Before FreeBSD 15 the ceiling is always that of the machine.
//   - NetBSD, OpenBSD, DragonFly, macOS: the ceiling only.
type System struct {
	// Ceiling is the largest limit that listen(2) grants, in connections.
	Ceiling int
	// Knob is the name of the setting that holds the ceiling. It is "" if the ceiling is
	// compiled in.
	Knob string
	// SYNBacklog is the maximum number of in-flight handshakes of a socket if SYN cookies
	// are off. When three quarters of it are in use, only clients that the kernel has seen
	// before get in. The limit of the socket bounds its SYN queue too. Linux only:
	// net.ipv4.tcp_max_syn_backlog, tcp(7).
	SYNBacklog int
	// SYNCookies is 0 if the kernel drops a SYN when the SYN queue is full, 1 if it
	// answers with a SYN cookie, and 2 if it answers every SYN with a cookie.
	//   - Linux: net.ipv4.tcp_syncookies, tcp(7).
	//   - FreeBSD: net.inet.tcp.syncookies, syncookies(4), which is 0 or 1.
	SYNCookies int
	// AbortOnOverflow is 1 if the kernel resets the client when a handshake finishes and
	// the accept queue is full. It is 0 if the client gets no answer.
	//   - Linux: net.ipv4.tcp_abort_on_overflow, tcp(7). The kernel drops a SYN in both
	//     cases.
	//   - FreeBSD: net.inet.tcp.syncache.rst_on_sock_fail.
	AbortOnOverflow int
	// MigrateRequests is 1 if the kernel moves the connections and in-flight handshakes of
	// a closed listener to another listener of its SO_REUSEPORT group. It is 0 if the
	// kernel resets them. Linux only: net.ipv4.tcp_migrate_req, since 5.14.
	MigrateRequests int

	// The counters are those of the TcpExt table in /proc/net/netstat. They count packets,
	// not clients, since the network namespace was made. Linux only.
	ListenOverflows   int64 // SYNs and final ACKs that met a full accept queue
	ListenDrops       int64 // ListenOverflows, and SYNs dropped for any other reason
	ReqQFullDrop      int64 // TCPReqQFullDrop: SYNs dropped because the SYN queue was full
	ReqQFullDoCookies int64 // TCPReqQFullDoCookies: SYNs answered with a cookie instead
}

// String returns the known settings and counters in one line. If no number is known, as in
// a zero System, it returns "nothing known".
func (s System) String() string {
	s = orNothing(s, noSystem)
	var parts []string
	add := func(format string, n int64) {
		if n != unknown {
			parts = append(parts, fmt.Sprintf(format, n))
		}
	}
	add(ceilingName(s.Knob)+" is %d", int64(s.Ceiling))
	add("SYN backlog %d", int64(s.SYNBacklog))
	add("SYN cookies %d", int64(s.SYNCookies))
	add("abort on overflow %d", int64(s.AbortOnOverflow))
	add("migrate requests %d", int64(s.MigrateRequests))
	add("%d listen overflows", s.ListenOverflows)
	add("%d listen drops", s.ListenDrops)
	add("%d SYNs dropped by a full SYN queue", s.ReqQFullDrop)
	add("%d SYNs answered with a cookie", s.ReqQFullDoCookies)
	if len(parts) == 0 {
		return nothingKnown
	}
	return strings.Join(parts, ", ")
}

// LogValue returns a group of the numbers and the knob's name, for [log/slog]. It omits
// unknown numbers.
func (s System) LogValue() slog.Value {
	s = orNothing(s, noSystem)
	return logKnown(
		slog.Int("ceiling", s.Ceiling),
		slog.String("knob", s.Knob),
		slog.Int("synBacklog", s.SYNBacklog),
		slog.Int("synCookies", s.SYNCookies),
		slog.Int("abortOnOverflow", s.AbortOnOverflow),
		slog.Int("migrateRequests", s.MigrateRequests),
		slog.Int64("listenOverflows", s.ListenOverflows),
		slog.Int64("listenDrops", s.ListenDrops),
		slog.Int64("reqQFullDrop", s.ReqQFullDrop),
		slog.Int64("reqQFullDoCookies", s.ReqQFullDoCookies),
	)
}

// systemJSON is a System in JSON.
type systemJSON struct {
	Ceiling           count  `json:"ceiling"`
	Knob              string `json:"knob"`
	SYNBacklog        count  `json:"synBacklog"`
	SYNCookies        count  `json:"synCookies"`
	AbortOnOverflow   count  `json:"abortOnOverflow"`
	MigrateRequests   count  `json:"migrateRequests"`
	ListenOverflows   count  `json:"listenOverflows"`
	ListenDrops       count  `json:"listenDrops"`
	ReqQFullDrop      count  `json:"reqQFullDrop"`
	ReqQFullDoCookies count  `json:"reqQFullDoCookies"`
}

func (s System) json() systemJSON {
	return systemJSON{
		count(s.Ceiling), s.Knob, count(s.SYNBacklog), count(s.SYNCookies), count(s.AbortOnOverflow), count(s.MigrateRequests),
		count(s.ListenOverflows), count(s.ListenDrops), count(s.ReqQFullDrop), count(s.ReqQFullDoCookies),
	}
}

// MarshalJSON writes the numbers with lower-case names. An unknown number is null.
func (s System) MarshalJSON() ([]byte, error) {
	return json.Marshal(orNothing(s, noSystem).json())
}

// UnmarshalJSON reads the format of MarshalJSON. A number that is null, missing or
// negative becomes unknown.
func (s *System) UnmarshalJSON(text []byte) error {
	j := noSystem.json()
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*s = System{
		j.Ceiling.int(), j.Knob, j.SYNBacklog.int(), j.SYNCookies.int(), j.AbortOnOverflow.int(), j.MigrateRequests.int(),
		int64(j.ListenOverflows), int64(j.ListenDrops), int64(j.ReqQFullDrop), int64(j.ReqQFullDoCookies),
	}
	return nil
}

// noSystem is a System in which nothing is known.
var noSystem = System{
	Ceiling: unknown, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
	ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
}

// ReadSystem reads the current settings and counters. If a number cannot be read, it is
// -1, and that is not an error. The error matches
//   - [errors.ErrUnsupported] on systems where the package can read nothing
//   - EMFILE or ENFILE if Linux has no file descriptor left to read them. This is also a
//     cause of a full accept queue. Numbers that were read are returned.
func ReadSystem() (System, error) {
	return readSystem(&sys.Real)
}

func readSystem(k *sys.Calls) (System, error) {
	s := noSystem
	r, known := ruleOf(runtime.GOOS)
	if !known {
		return s, errNoRule
	}
	s.Knob = r.knob
	var err error
	s.Ceiling, _, err = readBounds(k)
	return s, cmp.Or(noDescriptor(err), noDescriptor(readSettings(k, &s)))
}

// errNegative is the error for a negative ceiling. The kernel then lets no connection in:
// DragonFly stores the number as the limit of the queue.
var errNegative = errors.New("the ceiling is negative: the kernel refuses every connection")

// sysctlCeiling returns a number of sysctl(3) as a ceiling. A valid ceiling fits in an int32.
func sysctlCeiling(n uint32) (int, error) {
	if n > math.MaxInt32 {
		return unknown, errNegative
	}
	return int(n), nil
}
