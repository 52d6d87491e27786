package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
)

// unknown stands for a number that the system does not report.
const unknown = -1

// A reading is what the command knows of the machine at one moment.
type reading struct {
	at         time.Time
	namespaces []namespace
	notes      []string // sentences about what could not be read of the processes
	unread     []string // and about network namespaces that could not be read

	processesAt time.Time // when the processes were read; zero if they were not
	complete    bool      // the processes of all users could be read
}

// A namespace is a network namespace with its listeners.
type namespace struct {
	id        uint64 // its inode; 0 is the namespace of the command
	name      string // "" is the namespace of the command
	enter     string // the start of a command line that runs a command there
	listeners []listener

	system  acceptq.System // read for check only
	unasked int            // addresses with queued connections whose clients are unknown
}

// A listener is a queue with the processes that hold it.
type listener struct {
	acceptq.Queue
	Processes []observe.Process

	waiting []acceptq.Waiting // the clients, the longest wait first; read for check only
	stopped []int             // the processes that a signal has stopped; read for check only
	peak    int               // the largest length while check watched; 0 if it did not

	hopeless bool // judge has found that a longer queue would not help
}

// A place is a network namespace that can be read.
type place struct {
	id    uint64 // see namespace
	name  string
	enter string
	in    func(func() error) error // calls a function on a thread there
	close func()
}

// here is the network namespace of the command.
var here = place{in: func(f func() error) error { return f() }, close: func() {}}

// A question says what to read.
type question struct {
	all     bool     // every network namespace
	unnamed bool     // do not look for processes
	before  *reading // an earlier reading, whose processes may be used again

	// around reads more, on a thread in the namespace, before and after list reads the
	// listeners. It may be nil.
	around func(n *namespace, list func() error) error
}

// read reads the listeners of one or all namespaces, and their processes.
func read(ctx context.Context, q question) (reading, error) {
	r := reading{}
	places := []place{here}
	if q.all {
		others, unread, err := otherPlaces()
		if err != nil {
			return r, err
		}
		places, r.unread = append(places, others...), unread
	}
	defer func() {
		for _, p := range places {
			p.close()
		}
	}()
	r.at = time.Now()
	for _, p := range places {
		n := namespace{id: p.id, name: p.name, enter: p.enter}
		err := p.in(func() error {
			list := func() error {
				queues, err := acceptq.Queues(ctx)
				n.listeners = make([]listener, len(queues))
				for i, q := range queues {
					n.listeners[i].Queue = q
				}
				return err
			}
			if q.around != nil {
				return q.around(&n, list)
			}
			return list()
		})
		switch {
		case err != nil && p.name == "":
			return r, err
		case err != nil:
			r.unread = append(r.unread, fmt.Sprintf("The network namespace %s cannot be read: %v.", p.name, err))
		default:
			r.namespaces = append(r.namespaces, n)
		}
	}
	if q.unnamed || r.keepProcesses(q.before) {
		return r, nil
	}
	return r, r.findProcesses(ctx)
}

// keepFor is how long the processes of an earlier reading are used. To find them, the command
// reads a link for each descriptor of the machine.
const keepFor = 10 * time.Second

// keepProcesses sets the processes to those of an earlier reading. It returns false if that is
// old or does not have all listeners.
func (r *reading) keepProcesses(before *reading) bool {
	if before == nil || r.at.Sub(before.processesAt) >= keepFor {
		return false
	}
	known := make(map[uint64]*listener, before.count())
	for l := range before.all {
		known[l.Inode] = l
	}
	for l := range r.all {
		b := known[l.Inode]
		if b == nil || b.Addr != l.Addr {
			return false
		}
		l.Processes = b.Processes
	}
	r.processesAt, r.complete = before.processesAt, before.complete
	return true
}

// findProcesses sets the processes of all listeners.
func (r *reading) findProcesses(ctx context.Context) error {
	r.processesAt = r.at
	inodes := make([]uint64, 0, r.count())
	for l := range r.all {
		inodes = append(inodes, l.Inode)
	}
	holders, complete, err := observe.Processes(ctx, inodes...)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil { // for example no /proc: the queues are still worth showing
		r.notes = append(r.notes, noProcesses(err))
	}
	r.complete = complete
	for l := range r.all {
		l.Processes = systemdLast(holders[l.Inode])
	}
	return nil
}

// noProcesses says why the processes are unknown.
func noProcesses(err error) string { return fmt.Sprintf("The processes cannot be read: %v.", err) }

// systemdLast moves the process 1 to the end, because systemd keeps the sockets that it passes to
// a server, and does not accept from them.
func systemdLast(all []observe.Process) []observe.Process {
	if len(all) > 1 && all[0].PID == 1 {
		return append(slices.Clone(all[1:]), all[0])
	}
	return all
}

// count returns the number of listeners.
func (r *reading) count() (n int) {
	for _, space := range r.namespaces {
		n += len(space.listeners)
	}
	return n
}

// all yields the listeners of all namespaces.
func (r *reading) all(yield func(*listener) bool) {
	for i := range r.namespaces {
		n := &r.namespaces[i]
		for j := range n.listeners {
			if !yield(&n.listeners[j]) {
				return
			}
		}
	}
}

// A groupKey is what the members of a SO_REUSEPORT group have in common.
type groupKey struct {
	addr   netip.AddrPort
	device string
	v6only bool
}

func (l *listener) group() groupKey { return groupKey{l.Addr, l.Device, l.V6Only} }

// groups returns the listeners of each address. The group with the fullest member comes
// first.
func groups(listeners []listener) (all [][]*listener) {
	at := make(map[groupKey]int, len(listeners))
	all = make([][]*listener, 0, len(listeners))
	alone := make([]*listener, len(listeners)) // the memory of the groups with one member
	for i := range listeners {
		l := &listeners[i]
		if n, known := at[l.group()]; known {
			all[n] = append(all[n], l)
			continue
		}
		at[l.group()] = len(all)
		alone[i] = l
		all = append(all, alone[i:i+1:i+1])
	}
	return all
}

// A located is a group with the name of its namespace.
type located struct {
	namespace string
	group     []*listener
}

// groups returns the groups of all namespaces. The group with the fullest member comes first.
func (r *reading) groups() (all []located) {
	for _, n := range r.namespaces {
		for _, group := range groups(n.listeners) {
			all = append(all, located{n.name, group})
		}
	}
	if len(r.namespaces) > 1 { // Queues has sorted those of one
		slices.SortStableFunc(all, func(a, b located) int {
			return cmp.Compare(used(fullest(b.group).Stats), used(fullest(a.group).Stats))
		})
	}
	return all
}

// unreadable says why processes are missing.
func unreadable() string {
	if os.Geteuid() == 0 {
		return "even by root in this container or sandbox"
	}
	return "by this user: run acceptq as root"
}

// address returns the address of a listener, with the device that it is bound to. An IPv6
// wildcard that IPv4 clients cannot use is marked.
func (l *listener) address() string { return string(l.appendAddress(nil)) }

func (l *listener) appendAddress(text []byte) []byte {
	if l.Addr.Addr().Zone() != "" {
		text = append(text, printable(l.Addr.String())...)
	} else if text = l.Addr.AppendTo(text); l.Device != "" {
		text = append(append(text, '%'), printable(l.Device)...)
	}
	if l.V6Only && l.Addr.Addr().IsUnspecified() {
		text = append(text, " v6"...)
	}
	return text
}

// appendProcesses names the first process, and says how many others there are. It is "?" if
// there is none.
func appendProcesses(text []byte, all []observe.Process) []byte {
	if len(all) == 0 {
		return append(text, '?')
	}
	text = append(append(text, printable(all[0].Name)...), ' ')
	text = strconv.AppendInt(text, int64(all[0].PID), 10)
	if more := len(all) - 1; more > 0 {
		text = strconv.AppendInt(append(text, " +"...), int64(more), 10)
	}
	return text
}

func nameProcesses(all []observe.Process) string { return string(appendProcesses(nil, all)) }

// holder names the process that holds a listener, at the start of a sentence.
func (l *listener) holder() string {
	if len(l.Processes) == 0 {
		return fmt.Sprintf("A process of the user %d", l.UID)
	}
	p := l.Processes[0]
	return fmt.Sprintf("%s (pid %d)", printable(p.Name), p.PID)
}

// name names a listener at the start of a sentence.
func (l *listener) name(namespace string) string {
	text := "The listener on " + l.address()
	if len(l.Processes) > 0 {
		text = l.holder() + " on " + l.address()
	}
	if namespace != "" {
		text += " in the network namespace " + namespace
	}
	return text
}

// printable replaces what would change the terminal, or the order in which it shows letters. A
// process may give itself any name, and a user with a network namespace may do so with an
// interface.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, orDefault(name, "?"))
}

// count returns a number with its noun.
func count[N int | int64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.FormatInt(int64(n), 10) + " " + many
}

func orDefault(text, empty string) string { return cmp.Or(text, empty) }

// used returns the utilization, or 0 if it is unknown.
func used(s acceptq.Stats) float64 {
	part, _ := s.Utilization()
	return part
}

// fullest returns the member of a group with the highest utilization.
func fullest(group []*listener) *listener {
	return slices.MaxFunc(group, func(a, b *listener) int { return cmp.Compare(used(a.Stats), used(b.Stats)) })
}
