//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"fmt"
)

// Where kernels of one system differ by their release, the difference is data or a
// function of plain numbers here, so that each is tested on every system. FreeBSD's
// number is that of the kernel, unless jail(8) has given this jail another one.

const (
	releaseKnob = "kern.osreldate"             // FreeBSD's __FreeBSD_version
	groupKnob   = "net.inet.tcp.reuseport_ext" // DragonFly: SO_REUSEPORT spreads
	availKnob   = "kern.ipc.soavailconn"       // DragonFly: the most that kqueue(2) tells
	cookiesKnob = "net.inet.tcp.syncookies"    // FreeBSD
	firstOf13_3 = 1303000                      // 13.3-STABLE and 13.3-RELEASE begin here
	firstOf14   = 1400000                      // 14.0-CURRENT
	release14_0 = 1400097                      // 14.0-RELEASE
	release15_0 = 1500068                      // 15.0-RELEASE
)

// groupFacts is what decides whether a kernel spreads connections over the
// listeners of one address that have the option of reusePort.
type groupFacts struct {
	goos    string
	release int  // FreeBSD: kern.osreldate; -1 if unknown
	jailed  bool // this process runs in a jail
	off     bool // DragonFly: the administrator has turned it off
}

// refusal says why connections are not spread over the listeners of ep. It is ""
// if they are.
//
// FreeBSD: in_pcbinslbgrouphash in netinet/in_pcb.c leaves out the wildcard of
// both families, and the sockets of a jail before the change of D37029. That
// change was made in 14.0-CURRENT and merged to stable/13 after 13.2. The release
// numbers of 14.0-CURRENT that have it are not known here, so those before
// 14.0-RELEASE are taken not to.
//
// DragonFly: in_pcbinslocalgrphash_oncpu in netinet/in_pcb.c leaves out the sockets
// of a jail, and the lookup for IPv6 does not use the group.
func (k groupFacts) refusal(ep endpoint) string {
	switch k.goos {
	case "freebsd":
		if ep.network == "tcp6" && !ep.v6only && ep.wildcard() {
			return "FreeBSD does not spread connections over sockets of both families, listen on tcp4 and on tcp6"
		}
		if k.jailed && (k.release < firstOf13_3 || k.release >= firstOf14 && k.release < release14_0) {
			return fmt.Sprintf("FreeBSD %v (%s) does not spread connections over the sockets of a jail, 13.3 and 14.0 do",
				count(k.release), releaseKnob)
		}
	case "dragonfly":
		switch {
		case ep.network == "tcp6":
			return "DragonFly does not spread connections over IPv6 sockets, listen on tcp4"
		case k.jailed:
			return "DragonFly does not spread connections over the sockets of a jail"
		case k.off:
			return groupKnob + " is 0: sysctl " + groupKnob + "=1"
		}
	}
	return ""
}

// filtersIgnored reports whether a FreeBSD kernel takes an accept filter and lets
// every connection pass it. Since 14.0 an accepted socket inherits only some of the
// listener's options (solisten_clone in kern/uipc_socket.c). SO_ACCEPTFILTER is not
// one of them, and without it soisconnected does not call the filter.
//
// Seen to ignore filters: 1400507. Read in the sources: 1400081 still inherits all
// options, the stable/14 of 2025 and 1500012 do not have SO_ACCEPTFILTER among
// them. Seen to hold connections back: 1302001 and 1500068. Between these the exact
// numbers are not known, and every kernel from 1400082 until 15.0-RELEASE is taken
// to ignore filters.
func filtersIgnored(release int) bool {
	return release > 1400081 && release < release15_0
}

// filterModule tells how to load the accept filter of a name.
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

// cappedLength is the length of a queue of which the kernel told n and never tells
// more than most. At that number the length is unknown. A most of 0 or less is no
// bound.
func cappedLength(n, most int) int {
	if most > 0 && n >= most {
		return unknown
	}
	return n
}

// fastOpenFits refuses a limit that is too small for qlen pending connections of
// TCP Fast Open. FreeBSD allows half the limit, and does not store qlen
// (tcp_fastopen_alloc_counter and syncache_add in netinet). On Linux the count
// does not depend on the limit.
func fastOpenFits(goos string, qlen, limit int) error {
	if goos != "freebsd" || limit == unknown || qlen <= limit/2 {
		return nil
	}
	return fmt.Errorf("WithFastOpen(%d): granted %d, half the limit; ask for a backlog of %d: %w",
		qlen, limit/2, saturate(2*int64(qlen)), errors.ErrUnsupported)
}
