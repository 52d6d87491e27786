package acceptq

import (
	"fmt"
	"math"
	"runtime"
	"strconv"
	"strings"
)

// A rule describes what one kernel does with the argument of listen(2). The rules are
// data, so that the rule of each system is tested on every system.
type rule struct {
	knob       string // the name of the ceiling's setting; "" if it is compiled in
	formerKnob string // its name in older kernels, if that differs
	floor      string // the name of the floor's setting; "" if there is none
	set        string // the command that changes a setting, before "name=value"
	compiled   int    // the ceiling, if it is compiled in
	highest    int    // the largest value that the setting accepts and the kernel can use
	widest     int    // the largest number that the kernel stores unchanged
	zeroIsMax  bool   // listen(fd, 0) means the ceiling
	half       bool   // the queue grows to one and a half times the limit
	exact      bool   // the limit itself is the first length refused
	place      string // where the setting must be changed, before a comma; "" if there is only one place
}

// ruleOf returns the rule of the system named goos, a value of runtime.GOOS. If the rule
// is not known, every number is unknown. The sources:
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
			// The kernel accepts no more, so that 3×limit/2 fits in an unsigned int.
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
		return rule{compiled: 128, widest: math.MaxInt16}, true
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

// hostRule returns the rule of this system. If it is not known, every number is unknown.
func hostRule() rule {
	r, _ := ruleOf(runtime.GOOS)
	return r
}

// argument returns the number to pass to listen(2) for a request of n. The kernel does
// the clamping; only values that it cannot store are capped here. A negative request
// becomes the largest number, which every kernel clamps to its ceiling. A negative
// number cannot be passed, because NetBSD treats it as 0.
func (r rule) argument(n int) int {
	if n < 0 || n > r.widest || n == 0 && r.zeroIsMax {
		return r.widest
	}
	return n
}

// limit returns what the kernel stores for a request of n under these bounds. floor is 0
// on a system without a floor. If a bound is unknown, so is the limit.
func (r rule) limit(n, ceiling, floor int) int {
	if ceiling == unknown || floor == unknown {
		return unknown
	}
	return max(min(r.argument(n), ceiling), floor)
}

// effective returns the length to which a queue of this limit may grow.
func (r rule) effective(limit int) int {
	if r.half && limit != unknown {
		return saturate(3 * int64(limit) / 2)
	}
	return limit
}

// capacity returns the number of connections that a queue of this limit holds.
func (r rule) capacity(limit int) int {
	if limit == unknown || r.exact {
		return limit
	}
	return saturate(int64(r.effective(limit)) + 1)
}

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

// ceilingName returns the name of the ceiling for a sentence.
func ceilingName(knob string) string {
	if knob == "" {
		return "the compiled-in ceiling"
	}
	return knob
}

// raise returns the command that raises the ceiling to n, or to the highest value that
// the system accepts. It is "" if the ceiling is already as high.
func (r rule) raise(n, ceiling int) string {
	wanted := min(n, r.highest)
	if r.knob == "" || ceiling != unknown && ceiling >= wanted {
		return ""
	}
	return fmt.Sprintf("%s%s=%d", r.set, r.knob, wanted)
}

// clamp returns the error of a strict request of n for which the kernel grants limit.
func (r rule) clamp(n, limit, ceiling int) *ClampError {
	return &ClampError{Requested: n, Limit: limit, Ceiling: ceiling, Knob: r.knob, Raise: r.raise(n, ceiling)}
}

func (r rule) describe(b Backlog) string {
	var s strings.Builder
	if b.Requested >= 0 { // otherwise it was the maximum, or is unknown
		fmt.Fprintf(&s, "asked %d, ", b.Requested)
	}
	ceiling := fmt.Sprintf("%s is %v", ceilingName(r.knob), count(b.Ceiling))
	if b.Limit == unknown {
		if r != (rule{}) && b.Ceiling == unknown {
			return s.String() + "granted unknown: " + ceilingName(r.knob) + " cannot be read"
		}
		s.WriteString("granted unknown: this system does not report it")
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

	now := r.limit(b.Requested, b.Ceiling, 0) // what the next listen(2) would be granted
	raise := r.raise(b.Requested, b.Ceiling)
	switch {
	case now > b.Limit:
		fmt.Fprintf(&s, "%s now: SetBacklog(%s) grows the queue to %d without a restart", ceiling, argument(b.Requested), r.effective(now))
	case b.Requested >= 0 && b.Limit > b.Requested && r.floor != "":
		fmt.Fprintf(&s, "the kernel raised it to its minimum, %s", r.floor)
	case b.Requested == 0 && r.zeroIsMax:
		fmt.Fprintf(&s, "this kernel treats 0 as the maximum; %s", ceiling)
	case b.Clamped() && raise != "":
		fmt.Fprintf(&s, "%s: to raise it, %s%s, then SetBacklog(%d) or a restart", ceiling, raise, r.place, b.Requested)
	case now != unknown && now < b.Limit && r.floor == "":
		fmt.Fprintf(&s, "%s now: a restart would get %d", ceiling, now)
	case r.knob != "" && b.Limit >= r.highest:
		fmt.Fprintf(&s, "%s, and this kernel never grants more than %d", ceiling, r.highest)
	default:
		s.WriteString(ceiling)
	}
	return s.String()
}

// argument is how a program writes the number that it passes to SetBacklog.
func argument(n int) string {
	if n == MaxBacklog {
		return "MaxBacklog"
	}
	return strconv.Itoa(n)
}
