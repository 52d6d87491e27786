package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

// clients are clients that wait, the first for the given time.
func clients(n int, first time.Duration) (all []acceptq.Waiting) {
	for i := range n {
		client := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(1000+i))
		all = append(all, acceptq.Waiting{Client: client, Waited: first - time.Duration(i)*time.Millisecond})
	}
	return all
}

func with(l listener, change func(*listener)) listener {
	change(&l)
	return l
}

// system returns a reading with other settings and counters.
func (r reading) system(change func(*acceptq.System)) reading {
	change(&r.namespaces[0].system)
	return r
}

// Each row is a state of the machine and what check says about it.
func TestJudge(t *testing.T) {
	python := process(4711, "python3")
	nginx := queue("0.0.0.0:80", 1, 3, 511, 7, process(812, "nginx"), process(813, "nginx"))
	full := queue("127.0.0.1:8000", 2, 6, 5, 12, python)
	stuck := with(full, func(l *listener) { l.waiting = clients(6, 12*time.Second) })
	for name, test := range map[string]struct {
		before *reading
		now    reading
		status int
		want   string
	}{
		"all is well": {nil, at(0, nginx), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"nothing listens": {nil, at(0), statusOK, `
OK: nothing listens here.
`},
		"a full queue": {nil, at(0, nginx, full), statusCritical, `
CRITICAL: python3 (pid 4711) on 127.0.0.1:8000: the accept queue is full, 6 queued of 6. The kernel drops new clients.
  See who waits: acceptq waiting 127.0.0.1:8000
  See what the process does: strace -f -p 4711
  For a longer queue: give the program a backlog above 5. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
`},
		"a full queue of an unknown process, at the ceiling": {nil, at(0, queue("[::]:81", 3, 129, 128, 0)).system(func(s *acceptq.System) { s.Ceiling = 128 }), statusCritical, `
CRITICAL: The listener on [::]:81: the accept queue is full, 129 queued of 129. The kernel drops new clients.
  See who waits: acceptq waiting :81
  For a longer queue: sysctl -w net.core.somaxconn=4096, and restart the program. Its limit is the ceiling. If that stays, give the program a larger backlog.
NOTE: The ceiling, net.core.somaxconn, is 128, and 1 listener has that limit. They have asked for as much or more.
  For longer queues: sysctl -w net.core.somaxconn=4096, and restart the programs.
`},
		"nearly full": {nil, at(0, queue("127.0.0.1:80", 3, 104, 127, 0, python)), statusWarning, `
WARNING: python3 (pid 4711) on 127.0.0.1:80: the accept queue is nearly full, 104 queued of 128.
  See who waits: acceptq waiting 127.0.0.1:80
  See what the process does: strace -f -p 4711
  For a longer queue: give the program a backlog above 127. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
`},
		"a short queue is not nearly full": {nil, at(0, queue("127.0.0.1:80", 3, 1, 1, 0, python)), statusOK, `
OK: 1 listener, the fullest: python3 (pid 4711) on 127.0.0.1:80 has 1 queued of 2.
`},
		"some of a group": {nil, at(0,
			queue("127.0.0.1:80", 3, 9, 8, 0, python), queue("127.0.0.1:80", 4, 8, 8, 0, process(5, "other")), queue("127.0.0.1:80", 5, 0, 8, 0, python),
		), statusCritical, `
CRITICAL: python3 (pid 4711) on 127.0.0.1:80: the accept queue is full, 9 queued of 9, in 2 of 3 sockets. The kernel drops new clients.
  See who waits: acceptq waiting 127.0.0.1:80
  See what the process does: strace -f -p 4711
  For a longer queue: give the program a backlog above 8. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
`},
		"a long wait": {nil, at(0, with(nginx, func(l *listener) { l.waiting = clients(3, 1500*time.Millisecond) })), statusWarning, `
WARNING: nginx (pid 812) on 0.0.0.0:80 accepts too slowly or not at all: 3 clients wait, the first for 1.5s.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"a long wait, perhaps in another queue": {nil, at(0, with(nginx, func(l *listener) {
			l.waiting = clients(1, time.Minute)
			l.waiting[0].Shared = true
		})), statusWarning, `
WARNING: nginx (pid 812) on 0.0.0.0:80 accepts too slowly or not at all: 1 client waits, the first for 1m0s. Or this client is in the queue of another listener on this port.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"a long wait, and a longer one perhaps in another queue": {nil, at(0, with(nginx, func(l *listener) {
			l.Stats.Queued, l.waiting = 1, clients(3, time.Minute)
			l.waiting[0].Shared, l.waiting[2].Shared = true, true
			l.waiting[1].Waited = 30 * time.Second
		})), statusCritical, `
CRITICAL: nginx (pid 812) on 0.0.0.0:80 accepts too slowly or not at all: 1 client waits, the first for 30s.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"a short wait": {nil, at(0, with(nginx, func(l *listener) { l.waiting = clients(3, time.Second-1) })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"a stopped process": {nil, at(0, with(nginx, func(l *listener) { l.waiting, l.stopped = clients(3, 12*time.Second), []int{812, 813} })), statusCritical, `
CRITICAL: nginx (pid 812) on 0.0.0.0:80 accepts too slowly or not at all: 3 clients wait, the first for 12s.
  A signal has stopped processes. Continue them: kill -CONT 812 813
  See who waits: acceptq waiting :80
`},
		"a stopped process with a full queue": {nil, at(0, with(full, func(l *listener) {
			l.waiting, l.stopped = clients(6, 12*time.Second), []int{4711}
			l.waiting[1].Closed, l.waiting[2].Closed = true, true
		})).system(func(s *acceptq.System) { s.ListenOverflows = 5 }), statusCritical, `
CRITICAL: python3 (pid 4711) on 127.0.0.1:8000 accepts too slowly or not at all: 6 clients wait, 2 of them have given up, the first for 12s. The accept queue is full, 6 queued of 6. The kernel drops new clients.
  A signal has stopped the process. Continue it: kill -CONT 4711
  See who waits: acceptq waiting 127.0.0.1:8000
WARNING: Since the start of this machine or container, full accept queues dropped 5 packets of new clients. A client sends several.
  python3 (pid 4711) on 127.0.0.1:8000 has dropped 12 packets.
  A listener counts some packets twice, so its number can be larger than that of all overflows.
  See whether it goes on: acceptq check -for 10s
`},
		"a queue that was full while watched": {new(at(0, full)), at(10, with(full, func(l *listener) { l.Stats.Queued, l.peak = 1, 6 })), statusCritical, `
CRITICAL: python3 (pid 4711) on 127.0.0.1:8000: the accept queue was full, 6 queued of 6. The kernel dropped new clients.
  See who waits: acceptq waiting 127.0.0.1:8000
  See what the process does: strace -f -p 4711
  For a longer queue: give the program a backlog above 5. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
`},
		"a queue that was longer while watched": {new(at(0, nginx)), at(10, with(nginx, func(l *listener) { l.Stats.Queued, l.peak = 0, 200 })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 had at most 200 queued of 512.
`},
		"nobody accepted while watched": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(3, time.Second) }))),
			at(2, with(nginx, func(l *listener) { l.waiting = clients(3, 3*time.Second) })), statusCritical, `
CRITICAL: nginx (pid 812) on 0.0.0.0:80 has accepted nobody for 2s: 3 clients wait, the first for 3s.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"nobody accepted of clients that came together": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(3, time.Second) }))),
			at(2, with(nginx, func(l *listener) {
				l.waiting = clients(3, 3*time.Second)
				l.waiting[0].Client, l.waiting[1].Client = l.waiting[1].Client, l.waiting[0].Client
			})), statusCritical, `
CRITICAL: nginx (pid 812) on 0.0.0.0:80 has accepted nobody for 2s: 3 clients wait, the first for 3s.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"the first of several accepted": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(3, time.Second) }))),
			at(2, with(nginx, func(l *listener) { l.waiting = clients(3, 3*time.Second)[1:] })), statusWarning, `
WARNING: nginx (pid 812) on 0.0.0.0:80 accepts too slowly or not at all: 2 clients wait, the first for 3s.
  See who waits: acceptq waiting :80
  See what the processes do: strace -f -p 812 -p 813
`},
		"another client from the same port": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(1, time.Second) }))),
			at(2, with(nginx, func(l *listener) { l.waiting = clients(1, 500*time.Millisecond) })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"nobody accepted in a short time": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(3, time.Millisecond) }))),
			at(0, with(nginx, func(l *listener) { l.waiting = clients(3, 2*time.Millisecond) })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"the queue moved": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(4, time.Second)[1:] }))),
			at(2, with(nginx, func(l *listener) { l.waiting = clients(3, time.Millisecond) })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"the client may wait elsewhere": {new(at(0, with(nginx, func(l *listener) { l.waiting = clients(1, time.Millisecond) }))),
			at(0, with(nginx, func(l *listener) { l.waiting = clients(1, 2*time.Millisecond); l.waiting[0].Shared = true })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"overflows since the start": {nil, at(0, nginx, stuck).system(func(s *acceptq.System) { s.ListenOverflows = 10 }), statusCritical, `
CRITICAL: python3 (pid 4711) on 127.0.0.1:8000 accepts too slowly or not at all: 6 clients wait, the first for 12s. The accept queue is full, 6 queued of 6. The kernel drops new clients.
  See who waits: acceptq waiting 127.0.0.1:8000
  See what the process does: strace -f -p 4711
  For a longer queue: give the program a backlog above 5. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
WARNING: Since the start of this machine or container, full accept queues dropped 10 packets of new clients. A client sends several.
  python3 (pid 4711) on 127.0.0.1:8000 has dropped 12 packets. For a longer queue: give the program a backlog above 5. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
  nginx (pid 812) on 0.0.0.0:80 has dropped 7 packets. For a longer queue: give the program a backlog above 511. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
  The kernel does not report which of these queues overflowed. A listener also drops packets that harm nobody.
  A listener counts some packets twice, so its number can be larger than that of all overflows.
  See whether it goes on: acceptq check -for 10s
`},
		"old overflows of a listener that is gone": {nil, at(0, queue("127.0.0.1:1", 1, 0, 9, 0)).system(func(s *acceptq.System) { s.ListenOverflows = 1 }), statusOK, `
OK: 1 listener, the fullest: the listener on 127.0.0.1:1 has 0 queued of 10.
NOTE: Since the start of this machine or container, full accept queues dropped 1 packet, none of them those of the current listeners.
`},
		"overflows of a listener that is gone": {new(at(0)), at(10).system(func(s *acceptq.System) { s.ListenOverflows, s.ListenDrops = 1, 1 }), statusCritical, `
CRITICAL: In the last 10s, full accept queues dropped 1 packet of new clients. A client sends several. No current listener has dropped them, so the listener has probably been closed.
`},
		"overflows without the drops of a listener": {nil, at(0, queue("127.0.0.1:1", 1, 0, 9, unknown)).system(func(s *acceptq.System) { s.ListenOverflows = 1 }), statusWarning, `
WARNING: Since the start of this machine or container, full accept queues dropped 1 packet of new clients. A client sends several. This kernel does not report the drops of a listener, so check cannot name it.
  See whether it goes on: acceptq check -for 10s
`},
		"a counter that has wrapped": {new(at(0, nginx).system(func(s *acceptq.System) { s.ListenOverflows, s.ListenDrops = 1<<32-1, 1<<32-1 })),
			at(10, with(nginx, func(l *listener) { l.Stats.Drops += 2 })).system(func(s *acceptq.System) { s.ListenOverflows, s.ListenDrops = 1, 1 }), statusCritical, `
CRITICAL: In the last 10s, full accept queues dropped 1 packet of new clients. A client sends several.
  nginx (pid 812) on 0.0.0.0:80 has dropped 2 packets. For a longer queue: give the program a backlog above 511. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
  A listener counts some packets twice, so its number can be larger than that of all overflows.
`},
		"queues that were not asked": {nil, func() reading {
			r := at(0, nginx)
			r.namespaces[0].unasked = 3
			return r
		}(), statusUnknown, `
UNKNOWN: How long clients wait is unknown for 3 addresses with queued connections.
`},
		"namespaces that cannot be read": {nil, func() reading {
			r := at(0, nginx)
			r.unread = []string{"The network namespace x cannot be read: no."}
			return r
		}(), statusUnknown, `
UNKNOWN: The network namespace x cannot be read: no.
`},
		"overflows while watched": {new(at(0, queue("127.0.0.1:1", 1, 0, 4096, 1<<32-2), nginx).system(func(s *acceptq.System) { s.ListenOverflows = 100 })),
			at(10, queue("127.0.0.1:1", 1, 0, 4096, 2), nginx).system(func(s *acceptq.System) { s.ListenOverflows, s.ListenDrops = 104, 4 }), statusCritical, `
CRITICAL: In the last 10s, full accept queues dropped 4 packets of new clients. A client sends several.
  The listener on 127.0.0.1:1 has dropped 4 packets. For a longer queue: sysctl -w net.core.somaxconn=8192, and restart the program. Its limit is the ceiling. If that stays, give the program a larger backlog.
`},
		"no new overflow while watched": {new(at(0, nginx).system(func(s *acceptq.System) { s.ListenOverflows = 100 })),
			at(10, nginx).system(func(s *acceptq.System) { s.ListenOverflows = 100 }), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
`},
		"drops without an overflow": {new(at(0, nginx)), at(10, with(nginx, func(l *listener) { l.Stats.Drops = 9 })), statusOK, `
OK: 1 listener, the fullest: nginx (pid 812) on 0.0.0.0:80 has 3 queued of 512.
NOTE: In the last 10s, nginx (pid 812) on 0.0.0.0:80 dropped 2 packets, but no queue overflowed. Port scans, health checks that reset the handshake, TCP_DEFER_ACCEPT and repeated SYNs do that.
`},
		"a number of more than 31 bits": {new(at(0)), at(10).system(func(s *acceptq.System) { s.ListenOverflows = 1 << 32 }), statusCritical, `
CRITICAL: In the last 10s, full accept queues dropped 4294967296 packets of new clients. A client sends several. No current listener has dropped them, so the listener has probably been closed.
`},
		"a full SYN queue without cookies": {new(at(0, nginx)), at(10, with(nginx, func(l *listener) { l.Stats.Drops += 5 })).system(func(s *acceptq.System) { s.ReqQFullDrop, s.ListenDrops, s.SYNCookies = 5, 5, 0 }), statusCritical, `
CRITICAL: In the last 10s, full SYN queues dropped 5 SYNs.
  nginx (pid 812) on 0.0.0.0:80 has dropped 5 packets.
  Answer with SYN cookies instead: sysctl -w net.ipv4.tcp_syncookies=1
NOTE: SYN cookies are off, so a SYN flood keeps all clients out.
  sysctl -w net.ipv4.tcp_syncookies=1
`},
		"a SYN backlog that is three quarters full": {new(at(0).system(func(s *acceptq.System) { s.ListenDrops, s.SYNCookies = 5, 0 })),
			at(10).system(func(s *acceptq.System) { s.ListenDrops, s.SYNCookies = 7, 0 }), statusWarning, `
WARNING: In the last 10s, the kernel dropped 2 SYNs for other reasons. With SYN cookies off, that happens when three quarters of net.ipv4.tcp_max_syn_backlog are in use.
  sysctl -w net.ipv4.tcp_syncookies=1
NOTE: SYN cookies are off, so a SYN flood keeps all clients out.
  sysctl -w net.ipv4.tcp_syncookies=1
`},
		"a full SYN queue with cookies": {nil, at(0).system(func(s *acceptq.System) { s.ReqQFullDoCookies = 1 }), statusOK, `
OK: nothing listens here.
NOTE: Since the start of this machine or container, SYN queues were full, and the kernel answered 1 SYN with a cookie. No client was lost by that.
  If this is not a SYN flood, give the programs a larger backlog: the limit of a listener bounds its SYN queue too.
`},
		"cookies and an overflow": {nil, at(0).system(func(s *acceptq.System) { s.ReqQFullDoCookies, s.ListenOverflows = 1, 1 }), statusOK, `
OK: nothing listens here.
NOTE: Since the start of this machine or container, full accept queues dropped 1 packet, none of them those of the current listeners.
NOTE: Since the start of this machine or container, SYN queues were full, and the kernel answered 1 SYN with a cookie. As accept queues were full too, a client that waits for the server to speak first may get a reset after 15 s or more.
  If this is not a SYN flood, give the programs a larger backlog: the limit of a listener bounds its SYN queue too.
`},
		"a cookie for every SYN": {new(at(0)), at(10).system(func(s *acceptq.System) { s.ReqQFullDoCookies, s.SYNCookies = 3, 2 }), statusOK, `
OK: nothing listens here.
`},
		"a limit of the old ceiling": {nil, at(0, queue("127.0.0.1:1", 1, 0, 128, 0)), statusOK, `
OK: 1 listener, the fullest: the listener on 127.0.0.1:1 has 0 queued of 129.
NOTE: 1 listener has the limit 128, which was the ceiling before Linux 5.4. If the ceiling of 4096 was set after the programs began, restart them.
`},
		"counters that cannot be read": {nil, at(0).system(func(s *acceptq.System) {
			s.Ceiling, s.SYNCookies, s.ListenOverflows, s.ReqQFullDrop, s.ReqQFullDoCookies = unknown, unknown, unknown, unknown, unknown
		}), statusUnknown, `
UNKNOWN: The counters of lost packets cannot be read, so losses are not reported.
`},
		"drops and counters that cannot be read": {new(at(0, nginx).system(func(s *acceptq.System) { s.ListenOverflows = unknown })),
			at(10, with(nginx, func(l *listener) { l.Stats.Drops = 9 })).system(func(s *acceptq.System) { s.ListenDrops, s.ListenOverflows = unknown, unknown }), statusUnknown, `
UNKNOWN: The counters of lost packets cannot be read, so losses are not reported.
`},
	} {
		t.Run(name, func(t *testing.T) {
			findings := judge(test.before, test.now)
			require.Equal(t, strings.TrimPrefix(test.want, "\n"), report(findings, test.now))
			require.Equal(t, test.status, worst(findings))
		})
	}
}

// A problem of another namespace says where it is. A namespace that is new has only new
// losses.
func TestJudgeNamespaces(t *testing.T) {
	before := at(0)
	now := at(5)
	now.namespaces = append(now.namespaces, namespace{id: 1, name: "blue", enter: "nsenter --net=/run/netns/blue ", system: quiet, listeners: []listener{queue("127.0.0.1:1", 1, 9, 8, 3)}})
	now.namespaces[1].system.ListenOverflows = 3
	again := at(10)
	again.namespaces = []namespace{again.namespaces[0], now.namespaces[1]}
	again.namespaces[1].name = "sleep 17" // the process that gave it its name has ended
	require.NotContains(t, report(judge(&now, again), again), "overflow")
	now.notes = []string{"Something cannot be read."}
	require.Equal(t, strings.TrimPrefix(`
CRITICAL: The listener on 127.0.0.1:1 in the network namespace blue: the accept queue is full, 9 queued of 9. The kernel drops new clients.
  See who waits: nsenter --net=/run/netns/blue acceptq waiting 127.0.0.1:1
  For a longer queue: give the program a backlog above 8. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
CRITICAL: In the last 5s, full accept queues dropped 3 packets of new clients in the network namespace blue. A client sends several.
  The listener on 127.0.0.1:1 has dropped 3 packets. For a longer queue: give the program a backlog above 8. The ceiling, net.core.somaxconn, is 4096. If it was raised after the program began, restart the program.
NOTE: Something cannot be read.
`, "\n"), report(judge(&before, now), now))
}
