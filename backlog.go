package acceptq

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"strings"
)

// unknown stands for a number that the system does not tell. It is never 0:
// a queue of unknown length is not an empty one.
const unknown = -1

// Backlog is the account of one listener's accept queue: what was asked of
// listen(2), what the kernel made of it, and what the system would allow now.
// All numbers are in connections; -1 stands for unknown, but in Requested.
type Backlog struct {
	// Requested is the number given to WithBacklog or SetBacklog; -1 is as
	// much as the system allows, which is also the default.
	Requested int
	// Ceiling is the system-wide maximum at the moment of the call. It may
	// have changed since the kernel fixed Limit: a listening socket keeps its
	// limit until listen(2) is called on it again, see [Listener.SetBacklog].
	Ceiling int
	// Limit is what the kernel stored on this socket after clamping.
	Limit int
	// Effective is the length to which the accept queue may grow, the kernel's
	// factor included: 3×Limit/2 on FreeBSD (listen(2)), Limit elsewhere.
	Effective int
	// Capacity is how many finished handshakes really fit before the next is
	// refused: Limit+1 on Linux, 3×Limit/2+1 on FreeBSD, Limit on macOS (with
	// the unfinished ones), Limit+1 on the other BSDs once a burst is over.
	Capacity int
	// Measured says that Limit was read from the socket: TCP_INFO on Linux,
	// SO_LISTENQLIMIT on FreeBSD. Otherwise it was worked out from the kernel's
	// rule and the ceiling of that moment, or is unknown.
	Measured bool
}

// Clamped reports whether the kernel granted less than was asked. It is false
// where that is unknown, and where as much as allowed was asked.
func (b Backlog) Clamped() bool {
	return b.Requested >= 0 && b.Limit != unknown && b.Limit < b.Requested
}

// String says in one line what was asked and granted and, where less was
// granted or more is to be had by now, which setting decides and what applies it.
func (b Backlog) String() string {
	r, _ := ruleOf(runtime.GOOS)
	return r.describe(b)
}

// LogValue makes a group of the account's numbers, for [log/slog]. A number
// that is unknown is the string "unknown".
func (b Backlog) LogValue() slog.Value {
	return slog.GroupValue(
		slog.Int("requested", b.Requested),
		logCount("ceiling", int64(b.Ceiling)),
		logCount("limit", int64(b.Limit)),
		logCount("effective", int64(b.Effective)),
		logCount("capacity", int64(b.Capacity)),
		slog.Bool("measured", b.Measured),
		slog.Bool("clamped", b.Clamped()),
	)
}

// MarshalJSON writes the account with lower-case names and "clamped" besides.
// A number that is unknown is null.
func (b Backlog) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Requested int   `json:"requested"`
		Ceiling   count `json:"ceiling"`
		Limit     count `json:"limit"`
		Effective count `json:"effective"`
		Capacity  count `json:"capacity"`
		Measured  bool  `json:"measured"`
		Clamped   bool  `json:"clamped"`
	}{
		b.Requested, count(b.Ceiling), count(b.Limit), count(b.Effective), count(b.Capacity),
		b.Measured, b.Clamped(),
	})
}

// count is a number as JSON has it: null where it is unknown.
type count int64

func (c count) MarshalJSON() ([]byte, error) {
	if c == unknown {
		return []byte("null"), nil
	}
	return json.Marshal(int64(c))
}

// String is the number as a sentence has it.
func (c count) String() string {
	if c == unknown {
		return "unknown"
	}
	return fmt.Sprint(int64(c))
}

// logCount is a number as log/slog has it.
func logCount(key string, n int64) slog.Attr {
	if n == unknown {
		return slog.String(key, "unknown")
	}
	return slog.Int64(key, n)
}

// PredictBacklog says what WithBacklog(n) would get here now, by the kernel's
// rule and the ceiling of this moment; no socket is made and Measured is false.
// A negative n is as much as the system allows.
//
// The ceiling is the only thing looked at, and it can be wrong: gVisor's file
// names another number than its kernel uses. [Listener.Backlog] asks the socket.
// On Linux the ceiling is that of the calling thread's network namespace.
// The error is that of reading the ceiling; it matches [errors.ErrUnsupported]
// on systems whose rule the package does not know.
func PredictBacklog(n int) (Backlog, error) {
	return realSystem.predict(n)
}

func (sys *system) predict(n int) (Backlog, error) { return predict(n, sys.bounds) }

// predict is what n would get under the bounds that are read by bounds.
func predict(n int, bounds func() (ceiling, floor int, err error)) (Backlog, error) {
	r, known := ruleOf(runtime.GOOS)
	if !known {
		return r.account(n, unknown, unknown, false), errNoRule
	}
	ceiling, floor, err := bounds()
	return r.account(n, ceiling, r.limit(n, ceiling, floor), false), err
}

// A ClampError says that a listener made with [WithStrictBacklog] did not get
// the queue that it asked for. It comes inside a [*net.OpError].
type ClampError struct {
	Requested int    // the number asked for, in connections
	Limit     int    // what the kernel grants instead
	Ceiling   int    // the system-wide maximum when this was found; -1 if unknown
	Knob      string // the ceiling's name; "" where the kernel has it compiled in
	Raise     string // the command that raises the ceiling; "" where none can
}

func (e *ClampError) Error() string {
	var s strings.Builder
	fmt.Fprintf(&s, "backlog %d clamped to %d: %s is %v", e.Requested, e.Limit, ceilingName(e.Knob), count(e.Ceiling))
	if e.Raise != "" {
		fmt.Fprintf(&s, "; to raise it: %s", e.Raise)
	}
	return s.String()
}

// A rule is what one kernel makes of the number given to listen(2). The rules
// are data, so that each system's is tested on every other.
type rule struct {
	knob       string // the ceiling's name; "" where it is compiled in
	formerKnob string // its name in older kernels, if it had another
	floor      string // the floor's name; "" where there is none
	set        string // the command that sets a knob, before "name=value"
	compiled   int    // the ceiling where it is compiled in
	highest    int    // the largest value that the knob accepts and the kernel can use
	widest     int    // the largest number that the kernel stores unchanged
	zeroIsMax  bool   // listen(fd, 0) means the ceiling
	half       bool   // the queue grows to one and a half times the limit
	exact      bool   // the limit itself is the first length refused
}

// ruleOf returns the rule of the system that runtime.GOOS names. Where it is
// not known every number is unknown.
//
// Linux: __sys_listen in net/socket.c, sk_acceptq_is_full in include/net/sock.h.
// FreeBSD: solisten_proto and sonewconn in sys/kern/uipc_socket.c.
// macOS: solisten in bsd/kern/uipc_socket.c and sonewconn_internal in
// uipc_socket2.c, where so_qlimit is a short.
// NetBSD, OpenBSD, DragonFly: solisten in sys/kern/uipc_socket.c, tcp_input.c.
func ruleOf(goos string) (r rule, known bool) {
	switch goos {
	case "linux", "android":
		return rule{
			knob: "net.core.somaxconn", set: "sysctl -w ",
			highest: math.MaxInt32, widest: math.MaxInt32,
		}, true
	case "freebsd":
		return rule{
			knob: "kern.ipc.soacceptqueue", formerKnob: "kern.ipc.somaxconn", set: "sysctl ",
			// Chosen by the kernel so that 3×limit/2 fits an unsigned int.
			highest: math.MaxUint32 / 3, widest: math.MaxInt32,
			half: true,
		}, true
	case "darwin", "ios":
		return rule{
			knob: "kern.ipc.somaxconn", set: "sysctl -w ",
			highest: math.MaxInt16, widest: math.MaxInt16,
			zeroIsMax: true, exact: true,
		}, true
	case "netbsd":
		return rule{compiled: 128, highest: 128, widest: math.MaxInt16}, true
	case "openbsd":
		return rule{
			knob: "kern.somaxconn", floor: "kern.sominconn", set: "sysctl ",
			highest: math.MaxInt16, widest: math.MaxInt32,
		}, true
	case "dragonfly":
		return rule{
			knob: "kern.ipc.somaxconn", set: "sysctl ",
			highest: math.MaxInt16, widest: math.MaxInt16,
		}, true
	}
	return rule{}, false
}

// argument is the number to pass to listen(2) for a request of n. The kernel
// clamps, not we: only what it would not store as it is, is made smaller. A
// negative request becomes the largest number, which means the ceiling on every
// system, where a negative one does not (NetBSD makes it 0).
func (r rule) argument(n int) int {
	if n < 0 || n > r.widest || n == 0 && r.zeroIsMax {
		return r.widest
	}
	return n
}

// limit is what the kernel stores for a request of n under these bounds; floor
// is 0 where there is none. Of a bound that is unknown nothing follows.
func (r rule) limit(n, ceiling, floor int) int {
	if ceiling == unknown || floor == unknown {
		return unknown
	}
	return max(min(r.argument(n), ceiling), floor)
}

// effective is the length to which a queue of this limit may grow.
func (r rule) effective(limit int) int {
	if r.half && limit != unknown {
		return saturate(3 * int64(limit) / 2)
	}
	return limit
}

// capacity is the number of connections that a queue of this limit holds.
func (r rule) capacity(limit int) int {
	if limit == unknown || r.exact {
		return limit
	}
	return saturate(int64(r.effective(limit)) + 1)
}

// saturate keeps a number of connections positive where int has 32 bits.
func saturate(n int64) int { return int(min(n, math.MaxInt)) }

func (r rule) account(requested, ceiling, limit int, measured bool) Backlog {
	return Backlog{
		Requested: max(requested, -1),
		Ceiling:   ceiling,
		Limit:     limit,
		Effective: r.effective(limit),
		Capacity:  r.capacity(limit),
		Measured:  measured,
	}
}

// ceilingName is what a sentence calls the ceiling.
func ceilingName(knob string) string {
	if knob == "" {
		return "the compiled-in ceiling"
	}
	return knob
}

// raise is the command after which listen(fd, n) would be granted, as far as
// the system can; "" if the ceiling is as high as that already.
func (r rule) raise(n, ceiling int) string {
	if r.knob == "" || ceiling != unknown && ceiling >= r.wanted(n) {
		return ""
	}
	return fmt.Sprintf("%s%s=%d", r.set, r.knob, r.wanted(n))
}

// wanted is the ceiling under which a request of n is granted, as far as the
// system can.
func (r rule) wanted(n int) int {
	if n < 0 {
		return r.highest
	}
	return min(n, r.highest)
}

// clamp is the error of a strict request of n that got limit.
func (r rule) clamp(n, limit, ceiling int) *ClampError {
	return &ClampError{Requested: n, Limit: limit, Ceiling: ceiling, Knob: r.knob, Raise: r.raise(n, ceiling)}
}

func (r rule) describe(b Backlog) string {
	var s strings.Builder
	if b.Requested >= 0 { // else nobody named a number, or it is not known
		fmt.Fprintf(&s, "asked %d, ", b.Requested)
	}
	ceiling := fmt.Sprintf("%s is %v", ceilingName(r.knob), count(b.Ceiling))
	if b.Limit == unknown {
		s.WriteString("granted unknown: this system does not tell")
		if r != (rule{}) {
			s.WriteString("; " + ceiling)
		}
		return s.String()
	}
	fmt.Fprintf(&s, "granted %d", b.Limit)
	if !b.Measured {
		s.WriteString(" by the kernel's rule")
	}
	if b.Effective != b.Limit {
		fmt.Fprintf(&s, ", may grow to %d", b.Effective)
	}
	fmt.Fprintf(&s, ", holds %d; ", b.Capacity)

	now := r.limit(b.Requested, b.Ceiling, 0) // what listening again would be granted
	raise := r.raise(b.Requested, b.Ceiling)
	switch {
	case now > b.Limit:
		fmt.Fprintf(&s, "%s now: SetBacklog(%d) grows the queue to %d without a restart", ceiling, b.Requested, r.effective(now))
	case b.Requested >= 0 && b.Limit > b.Requested && r.floor != "":
		fmt.Fprintf(&s, "the kernel raised it to its minimum, %s", r.floor)
	case b.Requested == 0 && r.zeroIsMax:
		fmt.Fprintf(&s, "the kernel takes 0 for the most; %s", ceiling)
	case b.Clamped() && raise != "":
		fmt.Fprintf(&s, "%s: to raise it, %s, then SetBacklog(%d) or a restart", ceiling, raise, b.Requested)
	case now != unknown && now < b.Limit && r.floor == "":
		fmt.Fprintf(&s, "%s now: a restart would get %d", ceiling, now)
	case r.knob != "" && b.Limit >= r.highest:
		fmt.Fprintf(&s, "%s, and this kernel never grants more than %d", ceiling, r.highest)
	default:
		s.WriteString(ceiling)
	}
	return s.String()
}
