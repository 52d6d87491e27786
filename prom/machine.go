package acceptqprom

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// A MachineCollector is a [prometheus.Collector] of every TCP socket that listens in a
// network namespace, whatever program it belongs to. It comes from [NewMachineCollector].
// The command acceptq-exporter serves it. All methods may be called concurrently.
//
// The metrics are those of [Collector] that the kernel tells about the sockets of other
// programs: length, capacity, limit, drops, shards, fullest, and the numbers of the system.
// They have three labels:
//   - address: where the socket listens, such as "0.0.0.0:80". A socket that is bound to a
//     device has its name, as in "0.0.0.0%eth0:80".
//   - process: the name of the process that holds the socket, which the kernel cuts to 15
//     bytes. It is empty if the process is unknown.
//   - listener: both of them, as in "nginx 0.0.0.0:80". The alert rules and the dashboard
//     use this label.
//
// Sockets that have the same labels are reported as one listener, with their sums and the
// utilization of the fullest. A SO_REUSEPORT group is an example.
//
// The counter of drops includes what a socket has dropped before the first scrape. It does
// not wrap at 32 bits. When a socket is closed, its drops stay in the counter, unless nothing
// has listened with these labels for five minutes.
//
// A registry takes either a MachineCollector or a Collector, because the labels of their
// metrics differ.
type MachineCollector struct {
	descs
	max       int
	queues    listQueues    // acceptq.Queues
	processes listProcesses // observe.Processes

	mu        sync.Mutex // held during a reading, so that drops are added up in order
	sockets   map[socketID]*machineSocket
	listeners map[machineListener]*account
	other     *account
	asked     time.Time     // when the processes were read
	answered  time.Duration // how long that took
	known     bool          // whether all processes could be read
}

// A MachineOption changes what a MachineCollector reports.
type MachineOption func(*MachineCollector)

// WithMaxListeners limits how many listeners are reported one by one. If there are more,
// those with the lowest ports are reported, and the sums of the rest have the value "other"
// in each label. The metric tcp_accept_queue_shards of "other" says how many sockets these
// are, and tcp_accept_queue_fullest_ratio how full the fullest of them is. 0 or less is 200.
func WithMaxListeners(n int) MachineOption {
	return func(c *MachineCollector) { c.max = n }
}

const (
	// maxListeners is the default of WithMaxListeners. A listener has at most six series.
	maxListeners = 200
	// machinePatience is how long a scrape waits for the kernel. Prometheus waits for 10 s.
	machinePatience = 5 * time.Second
	// askAgain is the time after which the processes are read again: a socket that systemd
	// holds gets another holder when the service starts.
	askAgain = time.Minute
	// forget is how long a socket that has gone is remembered. The alert rules look back so
	// far for drops.
	forget = 5 * time.Minute
)

// NewMachineCollector returns a collector of the listening TCP sockets of the program's network
// namespace. It lists them once, so that an error shows before the first scrape.
//
// A scrape lists the sockets with [acceptq.Queues], which needs no privilege. It reads
// /proc only if a socket is new, or if the last time was more than a minute ago. The
// processes of other users usually need the capabilities CAP_SYS_PTRACE and
// CAP_DAC_READ_SEARCH, see ProcessesKnown.
//
// NewMachineCollector returns an error if the sockets cannot be listed. If that happens later,
// the scrape fails. On systems other than Linux the error matches [errors.ErrUnsupported].
func NewMachineCollector(opts ...MachineOption) (*MachineCollector, error) {
	c := newMachineCollector(acceptq.Queues, observe.Processes, opts)
	if _, err := c.read(time.Now()); err != nil {
		return nil, err
	}
	return c, nil
}

type (
	listQueues    = func(context.Context) ([]acceptq.Queue, error)
	listProcesses = func(context.Context, ...uint64) (map[uint64][]observe.Process, bool, error)
)

func newMachineCollector(queues listQueues, processes listProcesses, opts []MachineOption) *MachineCollector {
	c := &MachineCollector{
		queues:    queues,
		processes: processes,
		sockets:   make(map[socketID]*machineSocket),
		listeners: make(map[machineListener]*account),
	}
	for _, o := range opts {
		if o != nil {
			o(c)
		}
	}
	if c.max <= 0 {
		c.max = maxListeners
	}
	labels := []string{"listener", "address", "process"}
	c.descs = newDescs(0, labels, labels)
	return c
}

// ProcessesKnown reports whether the collector could look into all processes when it last
// read /proc. If it could not, the label process of some listeners can be empty. In a sandbox
// the kernel can refuse a single process, such as PID 1, even to root.
func (c *MachineCollector) ProcessesKnown() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known
}

// Describe implements [prometheus.Collector].
func (c *MachineCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.length, c.capacity, c.limit, c.drops, c.shards, c.fullest,
		c.ceiling, c.overflows, c.lost, c.synDrops, c.synCookies,
	} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector]. It lists the sockets of the calling thread's
// network namespace. If that fails, the scrape fails.
func (c *MachineCollector) Collect(ch chan<- prometheus.Metric) {
	c.system(ch)
	accounts, err := c.read(time.Now())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.length, err)
		return
	}
	m := make(samples, 0, 6*len(accounts))
	for i := range accounts {
		a := &accounts[i]
		m.send(ch, c.length, gauge, a.labels, float64(a.Queued))
		m.send(ch, c.capacity, gauge, a.labels, float64(a.Capacity))
		m.send(ch, c.limit, gauge, a.labels, float64(a.Limit))
		m.send(ch, c.drops, counter, a.labels, float64(a.Drops))
		if a.sockets > 1 || a.other {
			m.send(ch, c.shards, gauge, a.labels, float64(a.sockets))
			m.send(ch, c.fullest, gauge, a.labels, a.fullest)
		}
	}
}

// read lists the sockets and returns an account of each listener, in the order of their
// ports.
func (c *MachineCollector) read(now time.Time) ([]account, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), machinePatience)
	defer cancel()
	queues, err := c.queues(ctx)
	if err != nil {
		return nil, err
	}
	c.attribute(ctx, now, queues)

	tallies := make(map[machineListener]tally)
	for _, q := range queues {
		s := c.sockets[socketID{q.Inode, q.Addr}]
		l := machineListener{q.Addr, q.Device, s.process}
		tallies[l] = tallies[l].plus(s.tally(q.Stats))
	}
	var rest tally
	accounts := make([]account, 0, min(len(tallies), c.max)+1)
	for i, l := range slices.SortedFunc(maps.Keys(tallies), machineListener.compare) {
		a := c.listeners[l]
		if a == nil {
			a = c.account(l.String(), l.address(), l.process)
			c.listeners[l] = a
		}
		a.update(now, tallies[l])
		if i < c.max {
			accounts = append(accounts, *a)
		} else {
			rest = rest.plus(tallies[l])
		}
	}
	if rest.sockets > 0 {
		if c.other == nil {
			c.other = c.account("other", "other", "other")
			c.other.other = true
		}
		c.other.update(now, rest)
		accounts = append(accounts, *c.other)
	}
	maps.DeleteFunc(c.sockets, func(_ socketID, s *machineSocket) bool { return now.Sub(s.seen) > forget })
	maps.DeleteFunc(c.listeners, func(_ machineListener, a *account) bool { return now.Sub(a.seen) > forget })
	return accounts, nil
}

func (c *MachineCollector) account(labels ...string) *account {
	return &account{labels: prometheus.MakeLabelPairs(c.length, labels)}
}

// attribute notes which process holds each socket. A name that is known stays until another
// is found. Reading /proc costs the same for one
// socket and for all, so all are read. It takes at most a hundredth of the time, unless
// there are new sockets.
func (c *MachineCollector) attribute(ctx context.Context, now time.Time, queues []acceptq.Queue) {
	ask := now.Sub(c.asked) >= max(askAgain, 100*c.answered)
	inodes := make([]uint64, len(queues))
	for i, q := range queues {
		id := socketID{q.Inode, q.Addr}
		s := c.sockets[id]
		if s == nil {
			s = new(machineSocket)
			c.sockets[id], ask = s, true
		}
		s.seen = now
		inodes[i] = q.Inode
	}
	if !ask {
		return
	}
	start := time.Now()
	holders, known, err := c.processes(ctx, inodes...)
	c.asked, c.answered = now, time.Since(start)
	if c.known = known && err == nil; err != nil {
		return
	}
	for _, q := range queues {
		if p := processOf(holders[q.Inode]); p != "" {
			c.sockets[socketID{q.Inode, q.Addr}].process = p
		}
	}
}

// processOf returns the name of the process that uses a socket. Of several it is the one
// with the lowest PID, which usually is the parent of the others. systemd holds sockets
// that services use, so any other process is preferred to it.
func processOf(holders []observe.Process) (name string) {
	for _, p := range holders { // sorted by PID
		if name == "" || name == "systemd" {
			name = cmp.Or(p.Name, name)
		}
	}
	return name
}

// A socketID tells sockets apart. The kernel can use an inode number again.
type socketID struct {
	inode uint64
	addr  netip.AddrPort
}

// A machineSocket is what is remembered of a socket between two readings.
type machineSocket struct {
	seen    time.Time
	process string
	counted bool
	last    uint32 // the kernel's counter of drops at the last reading
	drops   int64  // all drops of the socket
}

// tally returns the numbers of a socket that has the given Stats now.
func (s *machineSocket) tally(stats acceptq.Stats) tally {
	t := tally{sockets: 1, Stats: stats, risen: unknown, fullest: unknown}
	if part, ok := stats.Utilization(); ok {
		t.fullest = part
	}
	if stats.Drops == unknown {
		return t
	}
	raw := uint32(stats.Drops)
	// A step of more than half of the range is no step, but another socket with the same
	// inode number.
	if t.risen = int64(raw - s.last); !s.counted || t.risen > math.MaxInt32 {
		t.risen = int64(raw)
	}
	s.counted, s.last = true, raw
	s.drops += t.risen
	t.Drops = s.drops
	return t
}

// A tally is the sum of the numbers of some sockets. A sum with an unknown part is unknown.
type tally struct {
	sockets int
	acceptq.Stats
	risen   int64   // the drops since the reading before
	fullest float64 // the largest utilization of a socket
}

func (t tally) plus(u tally) tally {
	if t.sockets == 0 {
		return u
	}
	t.sockets += u.sockets
	t.Queued = sum(t.Queued, u.Queued)
	t.Capacity = sum(t.Capacity, u.Capacity)
	t.Limit = sum(t.Limit, u.Limit)
	t.Drops = sum(t.Drops, u.Drops)
	t.risen = sum(t.risen, u.risen)
	if t.fullest == unknown || u.fullest == unknown {
		t.fullest = unknown // the unknown one may be the fullest
	} else {
		t.fullest = max(t.fullest, u.fullest)
	}
	return t
}

func sum[T int | int64](a, b T) T {
	if a == unknown || b == unknown {
		return unknown
	}
	return a + b
}

// A machineListener is a set of sockets that are reported together.
type machineListener struct {
	addr            netip.AddrPort
	device, process string
}

func (l machineListener) compare(m machineListener) int {
	return cmp.Or(cmp.Compare(l.addr.Port(), m.addr.Port()), l.addr.Compare(m.addr),
		cmp.Compare(l.device, m.device), cmp.Compare(l.process, m.process))
}

func (l machineListener) String() string {
	if l.process == "" {
		return l.address()
	}
	return l.process + " " + l.address()
}

// address returns the address with the device, as ss(8) writes it.
func (l machineListener) address() string {
	switch ip := l.addr.Addr(); {
	case l.device == "" || ip.Zone() != "":
		return l.addr.String()
	case ip.Is4():
		return fmt.Sprintf("%v%%%s:%d", ip, l.device, l.addr.Port())
	default:
		return netip.AddrPortFrom(ip.WithZone(l.device), l.addr.Port()).String()
	}
}

// An account is what is reported of a machineListener.
type account struct {
	labels []*dto.LabelPair
	other  bool
	seen   time.Time
	tally        // of the last reading; Drops is the counter
	total  int64 // the counter, which is kept while it is unknown
}

// update takes in a reading. The counter begins with the drops of all sockets. Then it rises
// with them, so that it does not fall when a socket leaves, and does not jump when one that
// was counted under another name joins.
func (a *account) update(now time.Time, t tally) {
	if t.risen != unknown {
		if a.seen.IsZero() {
			a.total = t.Drops
		} else {
			a.total += t.risen
		}
		t.Drops = a.total
	}
	a.seen, a.tally = now, t
}
