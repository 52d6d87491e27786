//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

import (
	"fmt"
	"math"
	"strconv"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// Differences between the releases of one system are data or functions of plain numbers
// here, so that they are tested on every system. kern.osreldate is the release of the
// kernel, unless jail(8) has set another number for the jail.

const (
	ReleaseKnob = "kern.osreldate"             // __FreeBSD_version, __DragonFly_version
	GroupKnob   = "net.inet.tcp.reuseport_ext" // DragonFly: SO_REUSEPORT spreads
	firstOf13_3 = 1303000                      // 13.3-STABLE and 13.3-RELEASE begin here
	firstOf14   = 1400000                      // 14.0-CURRENT
	release14_0 = 1400097                      // 14.0-RELEASE
	release15_0 = 1500068                      // 15.0-RELEASE
	jailsSpread = 500900                       // DragonFly 5.9: sockets of a jail are in the group
)

// groupFacts holds what decides whether a kernel spreads connections over the listeners
// of one address that have the option of reusePort.
type groupFacts struct {
	goos    string
	release int  // kern.osreldate; -1 if unknown
	jailed  bool // this process runs in a jail
	off     bool // DragonFly: the administrator has disabled it
}

// A release is a value of kern.osreldate.
type release int

// String returns the number, or "unknown".
func (r release) String() string {
	if r == sys.Unknown {
		return "unknown"
	}
	return strconv.Itoa(int(r))
}

// refusal returns the reason why the kernel does not spread connections over the listeners
// of ep. It returns "" if the kernel does so.
//
// FreeBSD: in_pcbinslbgrouphash in netinet/in_pcb.c omits the wildcard of both families.
// Before the change D37029 it also omits the sockets of a jail. That change was made in
// 14.0-CURRENT and merged to stable/13 after 13.2. It is not known which numbers of
// 14.0-CURRENT have it, so all before 14.0-RELEASE are assumed not to have it.
//
// DragonFly: before 5.9, in_pcbinslocalgrphash_oncpu in netinet/in_pcb.c omits the sockets
// of a jail. The lookup for IPv6 does not use the group.
func (k groupFacts) refusal(ep endpoint.Endpoint) string {
	switch k.goos {
	case "freebsd":
		if ep.Network == "tcp6" && !ep.V6Only && ep.Wildcard() {
			return "FreeBSD does not spread connections over sockets of both families; listen on tcp4 and on tcp6"
		}
		if k.jailed && (k.release < firstOf13_3 || k.release >= firstOf14 && k.release < release14_0) {
			return fmt.Sprintf("FreeBSD %v (%s) does not spread connections over the sockets of a jail; 13.3 and 14.0 do",
				release(k.release), ReleaseKnob)
		}
	case "dragonfly":
		switch {
		case ep.Network == "tcp6":
			return "DragonFly does not spread connections over IPv6 sockets; listen on tcp4"
		case k.jailed && k.release < jailsSpread:
			return fmt.Sprintf("DragonFly %v (%s) does not spread connections over the sockets of a jail; 5.9 does",
				release(k.release), ReleaseKnob)
		case k.off:
			return GroupKnob + " is 0; run sysctl " + GroupKnob + "=1"
		}
	}
	return ""
}

// MaxGroup returns the maximum number of listeners over which a kernel spreads connections.
// The kernel lets more sockets bind but assigns no connections to them.
//   - FreeBSD: INPCBLBGROUP_SIZMAX in netinet/in_pcb.c. The number holds for all sockets of
//     the address. A socket joins the group at bind(2), so one that was too many stays out
//     after others have closed.
//   - DragonFly: the index is the hash of the connection modulo NETISR_CPUMAX, and then
//     modulo the size of the group (in_pcblookup_localgroup in netinet/in_pcb.c).
func MaxGroup(goos string) int {
	switch goos {
	case "freebsd":
		return 256
	case "dragonfly":
		return 128
	}
	return math.MaxInt
}

// filtersIgnored reports whether a FreeBSD kernel accepts an accept filter and then ignores
// it. Since 14.0 an accepted socket inherits only some of the listener's options
// (solisten_clone in kern/uipc_socket.c). SO_ACCEPTFILTER is not one of them, and without
// it soisconnected does not call the filter.
//
// The releases:
//   - 1400507 ignores filters, as a test showed.
//   - The stable/14 of 2025 and 1500012 do not inherit SO_ACCEPTFILTER, as their sources
//     show.
//   - 1400081 inherits all options, as its sources show.
//   - 1302001 and 1500068 hold connections back, as a test showed.
//
// The exact numbers between these are not known. Every kernel from 1400082 until
// 15.0-RELEASE is assumed to ignore filters.
func filtersIgnored(release int) bool {
	return release > 1400081 && release < release15_0
}

// Filters reports whether the options set an accept filter. The kernel then holds
// connections back from the accept queue. NetBSD and DragonFly do not report how many. On
// Linux WithDeferAccept is no filter: the connections are in-flight handshakes.
func Filters(goos string, o *Options) bool {
	return o.AcceptFilter != nil || o.DeferAccept != 0 && goos != "linux" && goos != "android"
}

// filterModule returns the command that loads the accept filter with this name, or says
// that the filter is not loaded.
func filterModule(goos, name string) string {
	modules := map[string]map[string]string{
		"freebsd": {
			"dataready": "kldload accf_data", "httpready": "kldload accf_http",
			"dnsready": "kldload accf_dns", "tlsready": "kldload accf_tls",
		},
		"dragonfly": {"dataready": "kldload accf_data", "httpready": "kldload accf_http"},
		"netbsd":    {"dataready": "modload accf_dataready", "httpready": "modload accf_httpready"},
	}
	if command := modules[goos][name]; command != "" {
		return command
	}
	return "no such filter is loaded"
}

// FastOpenHalves reports whether the number of pending connections of TCP Fast Open
// depends on the limit. FreeBSD allows half the limit and does not store qlen
// (tcp_fastopen_alloc_counter and syncache_add in netinet). On Linux the number does not
// depend on the limit.
func FastOpenHalves(goos string, qlen int) bool { return goos == "freebsd" && qlen != 0 }

// Sbsize is the second bound of buffers on the BSDs: setrlimit(2).
const Sbsize = "RLIMIT_SBSIZE, the limit of all socket buffers of this user"

// bufferSetting returns the setting whose value bounds buffers, and the largest buffer if
// the setting is 1. The buffer is smaller than the setting, because the kernel adds the
// header of an mbuf to each cluster: 256 or 512 bytes to 2048 (sb_max_adj in
// kern/uipc_sockbuf.c and uipc_socket2.c).
func bufferSetting(goos string) (knob string, part [2]int64) {
	switch goos {
	case "freebsd":
		return "kern.ipc.maxsockbuf", [...]int64{8, 9}
	case "netbsd":
		return "kern.sbmax", [...]int64{4, 5}
	case "dragonfly":
		return "kern.ipc.maxsockbuf", [...]int64{4, 5}
	}
	return "", part
}

// bufferBound returns what a buffer of n bytes exceeds. most is the value of the setting,
// or unknown. The BSDs report the same error, ENOBUFS, for the setting and for the limit
// of the user.
func bufferBound(goos string, n, most int) string {
	knob, part := bufferSetting(goos)
	switch {
	case goos == "openbsd":
		return "the kernel's SB_MAX"
	case knob == "":
		return "kern.ipc.maxsockbuf"
	case most != sys.Unknown && int64(n) <= int64(most)*part[0]/part[1]:
		return Sbsize
	}
	return fmt.Sprintf("%d/%d of %s", part[0], part[1], knob)
}
