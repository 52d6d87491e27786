package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/acceptq/acceptq"
)

// A finding is a sentence about a problem, and what mends it.
type finding struct {
	level int // one of the statuses; statusOK is a note, statusUnknown something that cannot be told
	text  string
	mend  []string
}

// check says what is wrong. If watched is not 0, it watches for that time.
func check(ctx context.Context, all bool, watched time.Duration, out io.Writer) (status int, err error) {
	var (
		before *reading
		peaks  map[identity]int
	)
	if watched > 0 {
		first, err := readForCheck(ctx, all, true)
		if err != nil {
			return statusUnknown, err
		}
		before = &first
		if peaks, err = watchPeaks(ctx, all, watched); err != nil {
			return statusUnknown, err
		}
	}
	now, err := readForCheck(ctx, all, false)
	if err != nil {
		return statusUnknown, err
	}
	for l := range now.all {
		l.peak = peaks[l.identity()]
	}
	findings := judge(before, now)
	if _, err := io.WriteString(out, report(findings, now)); err != nil {
		return statusUnknown, err
	}
	return worst(findings), nil
}

// watchPeaks reads the queues often, for a time, and returns the largest length of each.
func watchPeaks(ctx context.Context, all bool, watched time.Duration) (map[identity]int, error) {
	often := peakInterval
	if all {
		often = watchInterval // each reading enters every namespace
	}
	peaks := make(map[identity]int)
	for end := time.Now().Add(watched); ; {
		r, err := read(ctx, question{all: all, unnamed: true})
		if err != nil {
			return nil, err
		}
		for l := range r.all {
			peaks[l.identity()] = max(peaks[l.identity()], l.Stats.Queued)
		}
		left := time.Until(end)
		if left <= 0 {
			return peaks, nil
		}
		if !pause(ctx, min(often, left)) {
			return nil, ctx.Err()
		}
	}
}

// peakInterval is the time between two readings of one namespace while check watches.
const peakInterval = 50 * time.Millisecond

// bySeverity has the statuses in the order of their severity. An unknown number is not harmless,
// and it does not hide a loss that is known.
var bySeverity = []int{statusOK, statusUnknown, statusWarning, statusCritical}

// severity compares two findings by their severity.
func severity(a, b finding) int {
	return cmp.Compare(slices.Index(bySeverity, a.level), slices.Index(bySeverity, b.level))
}

// worst returns the status of the most severe finding.
func worst(findings []finding) int {
	if len(findings) == 0 {
		return statusOK
	}
	return slices.MaxFunc(findings, severity).level
}

// report returns the findings as text, the worst first, so that the first line tells a
// monitoring system what it needs.
func report(findings []finding, now reading) string {
	var text strings.Builder
	slices.SortStableFunc(findings, func(a, b finding) int { return severity(b, a) })
	if worst(findings) == statusOK {
		text.WriteString("OK: " + summary(now) + "\n")
	}
	for _, f := range findings {
		text.WriteString([]string{"NOTE: ", "WARNING: ", "CRITICAL: ", "UNKNOWN: "}[f.level] + f.text + "\n")
		for _, m := range f.mend {
			text.WriteString("  " + m + "\n")
		}
	}
	for _, note := range now.notes {
		text.WriteString("NOTE: " + note + "\n")
	}
	return text.String()
}

// summary says in one sentence how full the queues are.
func summary(now reading) string {
	n, where := 0, ""
	var most *listener
	for _, space := range now.namespaces {
		n += len(space.listeners)
		for i := range space.listeners {
			if l := &space.listeners[i]; most == nil || l.mostUsed() > most.mostUsed() {
				most, where = l, space.name
			}
		}
	}
	if most == nil {
		return "nothing listens here."
	}
	has, queued := "has", most.Stats.Queued
	if most.peak > queued {
		has, queued = "had at most", most.peak
	}
	return fmt.Sprintf("%s, the fullest: %s %s %d queued of %d.",
		count(n, "listener", "listeners"), lowerFirst(most.name(where)), has, queued, most.Stats.Capacity)
}

// lowerFirst makes "The listener" fit into a sentence. A process keeps its name.
func lowerFirst(name string) string {
	if rest, ok := strings.CutPrefix(name, "The "); ok {
		return "the " + rest
	}
	return name
}

// The bounds of the judgment.
const (
	longWait     = time.Second      // a client that waits so long is a warning
	tooLongWait  = 10 * time.Second // and so long a loss
	usualCeiling = 4096             // net.core.somaxconn since Linux 5.4
	oldCeiling   = 128              // and before
)

// judge returns what is wrong in a reading. If before is not nil, only losses since then
// count.
func judge(before *reading, now reading) (all []finding) {
	for _, unread := range now.unread {
		all = append(all, finding{level: statusUnknown, text: unread})
	}
	for i := range now.namespaces {
		n := &now.namespaces[i]
		var then *namespace
		if before != nil {
			for j := range before.namespaces {
				if before.namespaces[j].id == n.id {
					then = &before.namespaces[j]
				}
			}
			if then == nil { // it did not exist, so all losses are new
				then = &namespace{}
			}
		}
		j := judgment{namespace: n, before: then}
		if before != nil {
			j.watched = now.at.Sub(before.at)
			j.known = make(map[identity]*listener, len(then.listeners))
			for i := range then.listeners {
				b := &then.listeners[i]
				j.known[b.identity()] = b
			}
		}
		for _, group := range groups(n.listeners) {
			all = append(all, j.queue(group)...)
		}
		all = append(all, j.losses()...)
		all = append(all, j.settings()...)
	}
	return all
}

// A judgment looks at one namespace.
type judgment struct {
	*namespace
	before  *namespace             // nil without an earlier reading
	known   map[identity]*listener // those of before
	watched time.Duration
}

// An identity tells whether a listener is that of an earlier reading. The kernel can use the
// inode of a closed socket again.
type identity struct {
	inode uint64
	addr  netip.AddrPort
}

func (l *listener) identity() identity { return identity{l.Inode, l.Addr} }

// mostUsed returns the largest utilization that was read, or 0 if it is unknown.
func (l *listener) mostUsed() float64 {
	s := l.Stats
	s.Queued = max(s.Queued, l.peak)
	return used(s)
}

// nameOf names a group of listeners in a sentence.
func (j judgment) nameOf(group []*listener) string {
	return fullest(group).name(j.namespace.name)
}

// where names the network namespace at the end of a sentence, if it is not that of the command.
func (j judgment) where() string {
	if j.namespace.name == "" {
		return ""
	}
	return " in the network namespace " + j.namespace.name
}

// earlier returns the earlier reading of a listener, or nil.
func (j judgment) earlier(l *listener) *listener {
	return j.known[l.identity()]
}

// queue returns what is wrong with a group: it does not accept, or its queue is full.
func (j judgment) queue(group []*listener) []finding {
	stuck, isStuck := j.stuck(group)
	full, isFull := j.full(group)
	hopeless := stopped(group) != nil || isStuck && stuck.idle // a longer queue would be full too
	if isFull && hopeless {
		full.mend = nil
	}
	for _, l := range group {
		l.hopeless = hopeless
	}
	name := j.nameOf(group)
	switch {
	case isStuck && isFull:
		text, _ := strings.CutPrefix(full.text, "the accept queue")
		return []finding{{
			level: max(stuck.level, full.level),
			text:  name + " " + stuck.text + " The accept queue" + text,
			mend:  append(j.wake(group), full.mend...),
		}}
	case isStuck:
		return []finding{{stuck.level, name + " " + stuck.text, j.wake(group)}}
	case isFull:
		return []finding{{full.level, name + ": " + full.text, append(j.wake(group), full.mend...)}}
	}
	return nil
}

// A part is a finding about a group, without its name.
type part struct {
	finding
	idle bool // it has accepted nobody while it was watched
}

// stuck finds a group that does not accept.
func (j judgment) stuck(group []*listener) (p part, found bool) {
	l := group[0]
	for _, other := range group {
		if len(other.waiting) > 0 {
			l = other
			break
		}
	}
	if len(l.waiting) == 0 {
		return part{}, false
	}
	queued := 0
	for _, member := range group {
		queued += member.Stats.Queued
	}
	oldest := l.waiting[0]
	// Some may be in the queue of another listener.
	clients := count(min(len(l.waiting), queued), "client waits", "clients wait")
	// A short time without an accept harms nobody.
	if b := j.earlier(l); b != nil && j.watched >= longWait && len(group) == 1 && allRemain(b.waiting, l.waiting, j.watched) {
		p.level, p.idle = statusCritical, true
		p.text = fmt.Sprintf("has accepted nobody for %s: %s%s, the first for %s.", shortly(j.watched), clients, gone(l.waiting, queued), shortly(oldest.Waited))
		return p, true
	}
	// A client that can only be here proves more than one that has waited longer.
	if i := slices.IndexFunc(l.waiting, func(w acceptq.Waiting) bool { return !w.Shared && w.Waited >= longWait }); i >= 0 {
		oldest = l.waiting[i]
	}
	switch {
	case oldest.Waited >= tooLongWait:
		p.level = statusCritical
	case oldest.Waited >= longWait:
		p.level = statusWarning
	default:
		return part{}, false
	}
	p.text = fmt.Sprintf("accepts too slowly or not at all: %s%s, the first for %s.", clients, gone(l.waiting, queued), shortly(oldest.Waited))
	if oldest.Shared && len(group) == 1 {
		p.level = statusWarning
		p.text += " Or this client is in the queue of another listener on this port."
	}
	return p, true
}

// gone says how many of the clients that wait have closed their connection. Of clients that may
// be in another queue nothing is known.
func gone(waiting []acceptq.Waiting, queued int) string {
	n := 0
	for _, w := range waiting {
		if w.Closed {
			n++
		}
	}
	if n == 0 || len(waiting) > queued {
		return ""
	}
	return fmt.Sprintf(", %d of them %s given up", n, pick(n, "has", "have"))
}

// allRemain reports whether the first clients of an earlier reading still wait. A listener accepts
// in the order of arrival, so it has accepted nobody then. The kernel measures the waits in steps
// of up to 10 ms while it lists them, so clients that have come in quick succession have no order.
func allRemain(before, now []acceptq.Waiting, watched time.Duration) bool {
	const tolerance = 50 * time.Millisecond
	waits := make(map[netip.AddrPort]time.Duration, len(now))
	for _, w := range now {
		if !w.Shared {
			waits[w.Client] = w.Waited
		}
	}
	for _, b := range before {
		if b.Waited < before[0].Waited-tolerance {
			break
		}
		// A shorter wait is that of another connection from the same port.
		if wait, remains := waits[b.Client]; !remains || wait < b.Waited+watched-tolerance {
			return false
		}
	}
	return len(before) > 0
}

// stopped returns the processes of a group that a signal has stopped.
func stopped(group []*listener) (pids []string) {
	for _, l := range group {
		for _, pid := range l.stopped {
			if text := fmt.Sprint(pid); !slices.Contains(pids, text) {
				pids = append(pids, text)
			}
		}
	}
	return pids
}

// wake says how to make a program accept.
func (j judgment) wake(group []*listener) (mend []string) {
	waiting := "See who waits: " + j.enter + "acceptq waiting " + addressOf(group[0])
	if pids := stopped(group); pids != nil {
		n := len(pids)
		return []string{fmt.Sprintf("A signal has stopped %s. Continue %s: kill -CONT %s",
			pick(n, "the process", "processes"), pick(n, "it", "them"), strings.Join(pids, " ")), waiting}
	}
	mend = []string{waiting}
	// Each holder may be the one that accepts, as the workers of nginx.
	holders := fullest(group).Processes
	var traced []string
	for _, p := range holders[:min(len(holders), maxTraced)] {
		traced = append(traced, fmt.Sprintf("-p %d", p.PID))
	}
	if len(traced) > 0 {
		mend = append(mend, fmt.Sprintf("See what %s: strace -f %s", pick(len(traced), "the process does", "the processes do"), strings.Join(traced, " ")))
	}
	return mend
}

// maxTraced is how many processes the command line of strace names.
const maxTraced = 8

// addressOf returns an address that the command understands.
func addressOf(l *listener) string {
	if l.Addr.Addr().IsUnspecified() {
		return fmt.Sprintf(":%d", l.Addr.Port())
	}
	return printable(l.Addr.String())
}

// full finds a group with a full or nearly full queue, or one that was so while it was watched.
func (j judgment) full(group []*listener) (p part, found bool) {
	l := slices.MaxFunc(group, func(a, b *listener) int { return cmp.Compare(a.mostUsed(), b.mostUsed()) })
	used, queued := l.mostUsed(), max(l.peak, l.Stats.Queued)
	// A queue for one or two connections is nearly full with each of them.
	if used < nearlyFull || used < 1 && queued < 3 {
		return part{}, false
	}
	which := ""
	if len(group) > 1 {
		n := 0
		for _, l := range group {
			if l.mostUsed() >= nearlyFull {
				n++
			}
		}
		which = fmt.Sprintf(", in %d of %d sockets", n, len(group))
	}
	verb := "is"
	if queued > l.Stats.Queued {
		verb = "was"
	}
	p = part{finding: finding{level: statusWarning, mend: []string{j.longer(l)}}}
	p.text = fmt.Sprintf("the accept queue %s nearly full, %d queued of %d%s.", verb, queued, l.Stats.Capacity, which)
	if used >= 1 {
		p.level = statusCritical
		p.text = fmt.Sprintf("the accept queue %s full, %d queued of %d%s. The kernel %s new clients.",
			verb, queued, l.Stats.Capacity, which, map[string]string{"is": "drops", "was": "dropped"}[verb])
	}
	return p, true
}

// longer says how the queue of a listener becomes longer.
func (j judgment) longer(l *listener) string {
	ceiling := j.system.Ceiling
	switch {
	case ceiling == unknown:
		return fmt.Sprintf("For a longer queue: give the program a backlog above %d.", l.Stats.Limit)
	case l.Stats.Limit < ceiling:
		return fmt.Sprintf("For a longer queue: give the program a backlog above %d. The ceiling, net.core.somaxconn, is %d. If it was raised "+
			"after the program began, restart the program.", l.Stats.Limit, ceiling)
	case l.Stats.Limit == ceiling:
		return fmt.Sprintf("For a longer queue: %ssysctl -w net.core.somaxconn=%d, and restart the program. Its limit is the ceiling. "+
			"If that stays, give the program a larger backlog.", j.enter, max(usualCeiling, 2*ceiling))
	}
	return fmt.Sprintf("Its limit, %d, is above the ceiling, net.core.somaxconn=%d: a restart makes the queue shorter.", l.Stats.Limit, ceiling)
}

// since returns how much a counter has risen: since the earlier reading, or since the
// namespace was made. It is unknown if one of the two numbers is.
func (j judgment) since(counter func(acceptq.System) int64) int64 {
	n, before := counter(j.system), int64(0)
	if j.before != nil {
		before = counter(j.before.system)
	}
	switch {
	case n == unknown || before == unknown:
		return unknown
	case n < before: // the counter of a new namespace, or one of 32 bits that has wrapped
		return n
	}
	return n - before
}

// period says since when the losses count.
func (j judgment) period() string {
	if j.before != nil {
		return "In the last " + shortly(j.watched)
	}
	return "Since the start of this machine or container"
}

// losses finds what the counters of the kernel prove. A loss in the watched time is critical.
// An older one is a warning, because it may be long ago.
func (j judgment) losses() (all []finding) {
	level := statusWarning
	if j.before != nil {
		level = statusCritical
	}
	where := j.where()
	overflows := j.since(func(s acceptq.System) int64 { return s.ListenOverflows })
	droppers, further := j.droppers()
	switch {
	case overflows > 0 && len(droppers) == 0 && j.before == nil && !j.unknownDrops():
		all = append(all, finding{statusOK, fmt.Sprintf("%s, full accept queues dropped %s%s, none of them those of the current listeners.",
			j.period(), count(overflows, "packet", "packets"), where), nil})
	case overflows > 0:
		f := finding{level: level, text: fmt.Sprintf("%s, full accept queues dropped %s of new clients%s. A client sends several.",
			j.period(), count(overflows, "packet", "packets"), where)}
		switch {
		case len(droppers) > 0:
		case j.unknownDrops():
			f.text += " This kernel does not report the drops of a listener, so check cannot name it."
		default:
			f.text += " No current listener has dropped them, so the listener has probably been closed."
		}
		for i, line := range dropped(droppers) {
			if !droppers[i].l.hopeless {
				line += " " + j.longer(droppers[i].l)
			}
			f.mend = append(f.mend, line)
		}
		if further > 0 {
			f.mend = append(f.mend, fmt.Sprintf("%s too.", count(further, "other listener has dropped packets", "other listeners have dropped packets")))
		}
		if len(droppers) > 1 {
			f.mend = append(f.mend, "The kernel does not report which of these queues overflowed. A listener also drops packets that harm nobody.")
		}
		if slices.ContainsFunc(droppers, func(d dropper) bool { return d.drops > overflows }) {
			f.mend = append(f.mend, "A listener counts some packets twice, so its number can be larger than that of all overflows.")
		}
		if j.before == nil {
			f.mend = append(f.mend, "See whether it goes on: "+j.enter+"acceptq check -for 10s")
		}
		all = append(all, f)
	// ListenDrops counts every dropped SYN. If it has not risen, the drops are of other packets.
	case j.before != nil && j.since(func(s acceptq.System) int64 { return s.ListenDrops }) == 0:
		for _, d := range droppers {
			all = append(all, finding{statusOK, fmt.Sprintf("%s, %s dropped %s, but no queue overflowed. Port scans, health checks "+
				"that reset the handshake, TCP_DEFER_ACCEPT and repeated SYNs do that.", j.period(), lowerFirst(d.l.name(j.namespace.name)),
				count(d.drops, "packet", "packets")), nil})
		}
	}
	if n := j.since(func(s acceptq.System) int64 { return s.ReqQFullDrop }); n > 0 {
		f := finding{level: level, text: fmt.Sprintf("%s, full SYN queues dropped %s%s.", j.period(), count(n, "SYN", "SYNs"), where)}
		if overflows <= 0 && j.before != nil {
			f.mend = dropped(droppers)
		}
		if j.system.SYNCookies == 0 {
			f.mend = append(f.mend, "Answer with SYN cookies instead: "+j.enter+"sysctl -w net.ipv4.tcp_syncookies=1")
		}
		all = append(all, f)
	}
	// With SYN cookies off, the kernel keeps a quarter of the SYN backlog for clients that it
	// knows. It counts that as a drop only.
	others := j.since(func(s acceptq.System) int64 { return s.ListenDrops }) - max(overflows, 0) -
		max(j.since(func(s acceptq.System) int64 { return s.ReqQFullDrop }), 0)
	if others > 0 && j.before != nil {
		f := finding{level: statusOK, text: fmt.Sprintf("%s, the kernel dropped %s for other reasons%s.", j.period(), count(others, "SYN", "SYNs"), where)}
		if overflows <= 0 && j.since(func(s acceptq.System) int64 { return s.ReqQFullDrop }) <= 0 {
			f.mend = dropped(droppers)
		}
		if j.system.SYNCookies == 0 {
			f.level = statusWarning
			f.text += " With SYN cookies off, that happens when three quarters of net.ipv4.tcp_max_syn_backlog are in use."
			f.mend = append(f.mend, j.enter+"sysctl -w net.ipv4.tcp_syncookies=1")
		}
		all = append(all, f)
	}
	// With the setting 2 the kernel answers every SYN with a cookie, and counts it here.
	if n := j.since(func(s acceptq.System) int64 { return s.ReqQFullDoCookies }); n > 0 && j.system.SYNCookies != 2 {
		l := statusOK
		if j.before != nil {
			l = statusWarning
		}
		harm := "No client was lost by that."
		if overflows != 0 {
			// The final ACK of such a client met a full accept queue. The client believes that it is
			// connected, and the kernel resets it when it sends something.
			harm = "As accept queues were full too, a client that waits for the server to speak first may get a reset after 15 s or more."
		}
		all = append(all, finding{l, fmt.Sprintf("%s, SYN queues were full, and the kernel answered %s with a cookie%s. %s",
			j.period(), count(n, "SYN", "SYNs"), where, harm),
			[]string{"If this is not a SYN flood, give the programs a larger backlog: the limit of a listener bounds its SYN queue too."}})
	}
	return all
}

// dropped says how many packets each listener has dropped.
func dropped(all []dropper) (lines []string) {
	for _, d := range all {
		lines = append(lines, fmt.Sprintf("%s has dropped %s.", d.l.name(""), count(d.drops, "packet", "packets")))
	}
	return lines
}

// A dropper is a listener that has dropped packets.
type dropper struct {
	l     *listener
	drops int64
}

// droppers returns the listeners with the most drops, and the number of the others.
func (j judgment) droppers() (most []dropper, others int) {
	for i := range j.listeners {
		l := &j.listeners[i]
		n := l.Stats.Drops
		if b := j.earlier(l); b != nil {
			n = risen(l, b)
		}
		if n > 0 {
			most = append(most, dropper{l, n})
		}
	}
	slices.SortStableFunc(most, func(a, b dropper) int { return int(max(min(b.drops-a.drops, 1), -1)) })
	const shown = 5
	if len(most) > shown {
		most, others = most[:shown], len(most)-shown
	}
	return most, others
}

// unknownDrops reports whether the drops of a listener are unknown, as before Linux 4.6.
func (j judgment) unknownDrops() bool {
	return slices.ContainsFunc(j.listeners, func(l listener) bool { return l.Stats.Drops == unknown })
}

// settings notes what limits the listeners, and what cannot be read.
func (j judgment) settings() (all []finding) {
	note := func(mend, format string, args ...any) {
		f := finding{level: statusOK, text: fmt.Sprintf(format, args...)}
		if mend != "" {
			f.mend = []string{mend}
		}
		all = append(all, f)
	}
	s := j.system
	atCeiling, atOld := 0, 0
	for _, l := range j.listeners {
		switch l.Stats.Limit {
		case s.Ceiling:
			atCeiling++
		case oldCeiling:
			atOld++
		}
	}
	if atCeiling > 0 && s.Ceiling != unknown && s.Ceiling < usualCeiling {
		note(fmt.Sprintf("For longer queues: %ssysctl -w net.core.somaxconn=%d, and restart the programs.", j.enter, usualCeiling),
			"The ceiling, net.core.somaxconn, is %d%s, and %s that limit. They have asked for as much or more.",
			s.Ceiling, j.where(), count(atCeiling, "listener has", "listeners have"))
	}
	if atOld > 0 && s.Ceiling > oldCeiling {
		note("", "%s the limit 128%s, which was the ceiling before Linux 5.4. If the ceiling of %d was set after the programs began, restart them.",
			count(atOld, "listener has", "listeners have"), j.where(), s.Ceiling)
	}
	if s.SYNCookies == 0 {
		note(j.enter+"sysctl -w net.ipv4.tcp_syncookies=1", "SYN cookies are off%s, so a SYN flood keeps all clients out.", j.where())
	}
	if j.since(func(s acceptq.System) int64 { return s.ListenOverflows }) == unknown {
		all = append(all, finding{level: statusUnknown, text: "The counters of lost packets cannot be read" + j.where() + ", so losses are not reported."})
	}
	if j.unasked > 0 {
		all = append(all, finding{level: statusUnknown, text: fmt.Sprintf("How long clients wait is unknown for %s%s.",
			count(j.unasked, "address with queued connections", "addresses with queued connections"), j.where())})
	}
	return all
}

// readForCheck reads what judge needs. begins reports whether a watch begins with this reading. An
// overflow raises a counter and the drops of its listener. When a watch begins, the counters are
// read after the listeners, and otherwise before them. So the drops have each overflow that the
// counters have.
func readForCheck(ctx context.Context, all, begins bool) (reading, error) {
	counters := func(n *namespace) { n.system, _ = acceptq.ReadSystem() } // what cannot be read is unknown
	r, err := read(ctx, question{all: all, around: func(n *namespace, list func() error) error {
		if !begins {
			counters(n)
		}
		if err := list(); err != nil {
			return err
		}
		if begins {
			counters(n)
		}
		n.ask(ctx, time.Now().Add(askFor))
		return nil
	}})
	for l := range r.all {
		if l.Stats.Queued <= 0 {
			continue
		}
		for _, p := range l.Processes {
			if isStopped(p.PID) {
				l.stopped = append(l.stopped, p.PID)
			}
		}
	}
	return r, err
}

// askFor bounds the time in which check asks who waits in a namespace. The kernel walks its table
// of connections for each address.
const askFor = 2 * time.Second

// ask asks who waits, the fullest queues first, until a time.
func (n *namespace) ask(ctx context.Context, until time.Time) {
	for _, group := range groups(n.listeners) {
		// The kernel does not report in which queue of a group a client is.
		l := fullest(group)
		if l.Stats.Queued <= 0 {
			continue
		}
		if !time.Now().Before(until) {
			n.unasked++
			continue
		}
		var err error
		// The queue of a socket that has been closed meanwhile does not count.
		if l.waiting, err = l.Waiting(ctx); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			n.unasked++
		}
	}
}
