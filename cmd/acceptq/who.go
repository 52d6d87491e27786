package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/acceptq/acceptq/observe"
)

// A connection is a TCP socket that has a local port and does not listen.
type connection struct {
	local, remote netip.AddrPort
	state         uint8
	inode         uint64 // 0 if no process holds it
	processes     []observe.Process
}

// The states of a connection that the sentences need.
const (
	established = 1
	timeWait    = 6
	closed      = 7
	bound       = 13
)

// A use says who uses a port.
type use struct {
	at          target
	listeners   []listener
	connections []connection
	low, high   int    // the ports for programs that dial; 0 if unknown
	reserved    string // those of them that the kernel does not give, as "8080,9000-9010"
	complete    bool
	unread      string // why no process could be read
}

// who says who uses an address.
func who(ctx context.Context, at target, out io.Writer) (status int, err error) {
	r, err := read(ctx, question{unnamed: true})
	if err != nil {
		return statusUnknown, err
	}
	u := use{at: at}
	u.low, u.high, u.reserved = dialPorts()
	var inodes []uint64
	for l := range r.all {
		if at.takes(l.Queue) {
			u.listeners = append(u.listeners, *l)
			inodes = append(inodes, l.Inode)
		}
	}
	if u.connections, err = socketsOn(ctx, at.port); err != nil {
		return statusUnknown, err
	}
	u.connections = slices.DeleteFunc(u.connections, func(c connection) bool {
		return at.addr.IsValid() && !overlap(c.local.Addr(), false, at.addr)
	})
	for _, c := range u.connections {
		inodes = append(inodes, c.inode)
	}
	holders, complete, err := observe.Processes(ctx, inodes...)
	if ctx.Err() != nil {
		return statusUnknown, ctx.Err()
	}
	if err != nil { // for example no /proc: the sockets are still worth showing
		u.unread = noProcesses(err)
	}
	u.complete = complete
	for i := range u.listeners {
		u.listeners[i].Processes = systemdLast(holders[u.listeners[i].Inode])
	}
	for i, c := range u.connections {
		u.connections[i].processes = holders[c.inode]
	}
	if _, err := io.WriteString(out, u.text()); err != nil {
		return statusUnknown, err
	}
	if len(u.listeners)+len(u.connections) == 0 {
		return statusWarning, nil
	}
	return statusOK, nil
}

// text answers in sentences and lists.
func (u use) text() string {
	var text strings.Builder
	unnamed := false
	if len(u.listeners)+len(u.connections) == 0 {
		fmt.Fprintf(&text, "%v is free: no TCP socket of this network namespace uses it.\n", u.at)
		return text.String()
	}
	for _, group := range groups(u.listeners) {
		l := fullest(group)
		if len(group) == 1 {
			fmt.Fprintf(&text, "%s listens on %s: %v\n", l.holder(), l.address(), l.Stats)
			unnamed = unnamed || len(l.Processes) == 0
			continue
		}
		fmt.Fprintf(&text, "%d sockets listen on %s with SO_REUSEPORT:\n", len(group), l.address())
		for _, l := range group {
			fmt.Fprintf(&text, "  %s: %v\n", nameProcesses(l.Processes), l.Stats)
			unnamed = unnamed || len(l.Processes) == 0
		}
	}
	if len(u.connections) > 0 {
		fmt.Fprintf(&text, "%s %d as the local port:\n", count(len(u.connections), "connection has", "connections have"), u.at.port)
		rows, missing := u.rows()
		unnamed = unnamed || missing
		for _, row := range rows {
			fmt.Fprintf(&text, "  %s\n", row)
		}
	}
	text.WriteString("\nWhy another program may get \"address already in use\":\n")
	for _, why := range u.why() {
		fmt.Fprintf(&text, "- %s\n", why)
	}
	switch {
	case u.unread != "":
		fmt.Fprintf(&text, "\n%s\n", u.unread)
	case unnamed && !u.complete:
		fmt.Fprintf(&text, "\n? Some processes cannot be read %s.\n", unreadable())
	}
	return text.String()
}

// maxRows is how many lines who prints for the connections.
const maxRows = 20

// rows returns the connections as lines: alike ones are counted. missing reports whether a
// process is unknown.
func (u use) rows() (lines []string, missing bool) {
	type kind struct{ state, holder string }
	type some struct {
		kind
		n       int
		example connection
	}
	var all []some
	at := make(map[kind]int)
	for _, c := range u.connections {
		k := kind{stateName(c.state), nameProcesses(c.processes)}
		switch {
		case c.inode == 0 && c.state == established && len(u.listeners) > 0:
			k.holder = "in the accept queue"
		case c.inode == 0:
			k.holder = "no process"
		case len(c.processes) == 0:
			missing = true
		}
		i, known := at[k]
		if !known {
			i = len(all)
			at[k] = i
			all = append(all, some{kind: k, example: c})
		}
		all[i].n++
	}
	slices.SortStableFunc(all, func(a, b some) int { return cmp.Compare(b.n, a.n) })
	for i, s := range all {
		if i == maxRows {
			lines = append(lines, fmt.Sprintf("and %d more kinds", len(all)-i))
			break
		}
		line := fmt.Sprintf("%d %s, %s", s.n, s.state, s.holder)
		if s.example.state != bound {
			line += fmt.Sprintf(", for example to %v", s.example.remote)
		}
		lines = append(lines, line)
	}
	return lines, missing
}

// why returns sentences that say why a program cannot listen on the address. They claim only
// what the kernel lists: it does not report whether a socket has SO_REUSEADDR.
func (u use) why() (all []string) {
	for _, group := range groups(u.listeners) {
		l := fullest(group)
		by := fmt.Sprintf("%s listens on %s.", l.holder(), l.address())
		if len(group) > 1 {
			by = fmt.Sprintf("%d sockets listen on %s.", len(group), l.address())
		}
		all = append(all, by+" Another program can listen there only if both set SO_REUSEPORT and run as the same user.")
	}
	var open, waiting, boundOnly int
	var holders []string
	for _, c := range u.connections {
		switch c.state {
		case timeWait:
			waiting++
		case bound:
			boundOnly++
			all = append(all, fmt.Sprintf("%s has bound the port and does not listen.", nameProcesses(c.processes)))
		default:
			open++
			if name := nameProcesses(c.processes); len(c.processes) > 0 && !slices.Contains(holders, name) {
				holders = append(holders, name)
			}
		}
	}
	if len(u.listeners) > 0 {
		return all
	}
	dialed := u.at.port
	inRange := u.low > 0 && int(dialed) >= u.low && int(dialed) <= u.high && !isReserved(u.reserved, dialed)
	if open > 0 {
		by := ""
		if len(holders) > 0 {
			by = " of " + strings.Join(holders, ", ")
		}
		all = append(all, fmt.Sprintf("No socket listens, but %s%s %s the port. If a program has dialed %s, no server can listen "+
			"on %s local address, or on all addresses, until %s. If a server that has ended had accepted %[4]s, a server that sets SO_REUSEADDR can listen.",
			count(open, "connection", "connections"), by, pick(open, "uses", "use"), pick(open, "it", "them"), pick(open, "its", "their"),
			pick(open, "it ends", "they end")))
	}
	if waiting > 0 {
		all = append(all, fmt.Sprintf("%s in TIME_WAIT, for 60 s at most. If a server here had accepted them, a server that sets "+
			"SO_REUSEADDR, as net.Listen of Go does, can listen now.", count(waiting, "connection is", "connections are")))
	}
	if inRange && open+waiting > 0 {
		all = append(all, fmt.Sprintf("Port %d is in a range that the kernel gives to programs that dial, %d to %d. To keep it "+
			"for a server: sysctl -w net.ipv4.ip_local_reserved_ports=%s", dialed, u.low, u.high,
			strings.TrimPrefix(fmt.Sprintf("%s,%d", u.reserved, dialed), ",")))
	}
	return all
}

func pick(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}
