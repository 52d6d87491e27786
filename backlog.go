package acceptq

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"runtime"
	"strings"

	"github.com/acceptq/acceptq/internal/sys"
)

// MaxBacklog requests the maximum that the system allows, in [WithBacklog] and
// [Listener.SetBacklog]. Every negative number does the same.
const MaxBacklog = -1

// Backlog is the account of one accept queue: the requested backlog, what the kernel
// granted, and what the system allows now. All numbers are in connections. -1 means
// unknown, except in Requested, where it is [MaxBacklog].
type Backlog struct {
	// Requested is the argument of WithBacklog or SetBacklog. [MaxBacklog] requests the
	// maximum that the system allows. It is the default, and the value after Wrap.
	Requested int
	// Ceiling is the current system-wide maximum. It may have changed since the kernel
	// stored Limit. A listening socket keeps its limit until the next listen(2), see
	// [Listener.SetBacklog].
	Ceiling int
	// Limit is what the kernel stored on this socket after clamping.
	Limit int
	// Effective is the length to which the accept queue may grow. It is 3×Limit/2 on
	// FreeBSD, see listen(2), and Limit on other systems.
	Effective int
	// Capacity is how many finished handshakes fit before the kernel refuses the next:
	//   - Linux: Limit+1.
	//   - FreeBSD: 3×Limit/2+1.
	//   - macOS: Limit, where unfinished handshakes count too.
	//   - NetBSD, OpenBSD, DragonFly: Limit+1. A burst can exceed it.
	Capacity int
	// Measured reports whether Limit was read from the socket: with TCP_INFO on Linux,
	// with SO_LISTENQLIMIT on FreeBSD. [Listener.Backlog] reads it at each call until
	// Close. If Measured is false, Limit was computed from the kernel's rule and the
	// ceiling at the time of listen(2), or is unknown.
	Measured bool
}

// Clamped reports whether the kernel granted less than requested. It is false if the
// limit is unknown. It is also false if the maximum was requested.
func (b Backlog) Clamped() bool {
	return b.Limit != unknown && b.Limit < b.Requested
}

// String describes the account in one line, as in "backlog: asked 64, granted 64, ...". If
// the kernel granted less than requested, or would grant more now, the line names the
// setting and how to apply it. A zero Backlog is "backlog: nothing known".
func (b Backlog) String() string { return logSubject + b.describe() }

// logSubject begins the text of a Backlog, so that a log line needs no other words.
const logSubject = "backlog: "

func (b Backlog) describe() string {
	if b == (Backlog{}) {
		return nothingKnown
	}
	r := hostRule()
	r.place = ceilingPlace()
	return r.describe(b)
}

// LogValue returns a group of the account's numbers, for [log/slog]. It omits unknown
// numbers and a Requested of MaxBacklog.
func (b Backlog) LogValue() slog.Value {
	b = orNothing(b, noBacklog)
	return logKnown(
		slog.Int("requested", b.Requested),
		slog.Int("ceiling", b.Ceiling),
		slog.Int("limit", b.Limit),
		slog.Int("effective", b.Effective),
		slog.Int("capacity", b.Capacity),
		slog.Bool("measured", b.Measured),
		slog.Bool("clamped", b.Clamped()),
	)
}

// backlogJSON is a Backlog in JSON.
type backlogJSON struct {
	Requested int   `json:"requested"`
	Ceiling   count `json:"ceiling"`
	Limit     count `json:"limit"`
	Effective count `json:"effective"`
	Capacity  count `json:"capacity"`
	Measured  bool  `json:"measured"`
	Clamped   bool  `json:"clamped"`
}

func (b Backlog) json() backlogJSON {
	return backlogJSON{
		b.Requested, count(b.Ceiling), count(b.Limit), count(b.Effective), count(b.Capacity),
		b.Measured, b.Clamped(),
	}
}

// MarshalJSON writes the account with lower-case names and adds "clamped", the result
// of [Backlog.Clamped]. An unknown number is null.
func (b Backlog) MarshalJSON() ([]byte, error) {
	return json.Marshal(orNothing(b, noBacklog).json())
}

// UnmarshalJSON reads the format of MarshalJSON. A number that is null, missing or
// negative becomes unknown.
func (b *Backlog) UnmarshalJSON(text []byte) error {
	j := noBacklog.json()
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*b = Backlog{
		max(j.Requested, -1), j.Ceiling.int(), j.Limit.int(), j.Effective.int(), j.Capacity.int(),
		j.Measured,
	}
	return nil
}

// noBacklog is an account in which nothing is known.
var noBacklog = rule{}.account(MaxBacklog, unknown, unknown, false)

// predict returns what the kernel would grant for n now, by its rule and the current ceiling.
// It makes no socket, so Measured is false.
func predict(k *sys.Calls, n int) (Backlog, error) {
	return predictWith(n, func() (int, int, error) { return readBounds(k) })
}

// predictWith returns what the kernel would grant for n. It calls bounds to read the ceiling
// and the floor.
func predictWith(n int, bounds func() (ceiling, floor int, err error)) (Backlog, error) {
	r, known := ruleOf(runtime.GOOS)
	if !known {
		return r.account(n, unknown, unknown, false), errNoRule
	}
	ceiling, floor, err := bounds()
	return r.account(n, ceiling, r.limit(n, ceiling, floor), false), err
}

// A ClampError reports that the kernel grants a listener made with [WithStrictBacklog]
// less than it requested. It is wrapped in a [*net.OpError].
type ClampError struct {
	Requested int    // the requested backlog, in connections
	Limit     int    // what the kernel grants instead
	Ceiling   int    // the system-wide maximum at that time; -1 if unknown
	Knob      string // the name of the setting; "" if the ceiling is compiled in
	Raise     string // the command that raises the ceiling; "" if there is none
}

func (e *ClampError) Error() string {
	var s strings.Builder
	fmt.Fprintf(&s, "backlog %d clamped to %d: %s is %v", e.Requested, e.Limit, ceilingName(e.Knob), count(e.Ceiling))
	if e.Raise != "" {
		fmt.Fprintf(&s, "; to raise it: %s%s", e.Raise, ceilingPlace())
	}
	return s.String()
}
