package acceptq

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// replicaEnv holds the replicaSpec of a process that a test starts as a server. A replica
// reads commands from its standard input and answers each with a line. It ends with its
// input.
const replicaEnv = "ACCEPTQ_TEST_REPLICA"

// A replicaSpec describes a server process.
type replicaSpec struct {
	ID               byte // its answer to each client
	Network, Address string
	Shards           int
	UID              int
	TTL              bool // a drain must use the minimum TTL
	UserTTL          int  // the IP_TTL and IPV6_UNICAST_HOPS of the user; 0 for the default
	Unsteered        bool
}

func (s replicaSpec) name() string {
	way, user := "filter", "root"
	if s.TTL {
		way = "ttl"
	}
	if s.UID != 0 {
		user = "nobody"
	}
	return way + "_" + user
}

// become gives up root. The process then has no capability.
func (s replicaSpec) become(t *testing.T) {
	if s.UID == 0 {
		return
	}
	require.NoError(t, syscall.Setgroups(nil))
	require.NoError(t, syscall.Setgid(s.UID))
	require.NoError(t, syscall.Setuid(s.UID))
	// A process that starts as this user owns its files in /proc.
	require.NoError(t, unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0))
}

// options returns the options of the listeners. The last function stores the TTL settings
// of the user in want.
func (s replicaSpec) options(want *ttlSettings) []Option {
	opts := []Option{WithReusePort(), WithBacklog(1024)}
	if s.Unsteered {
		opts = append(opts, WithoutSteering())
	}
	return append(opts, WithControl(func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if s.TTL { // Drain does not replace a filter of the user
				pass := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32}
				realKernel.attachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass})
			}
			if s.UserTTL != 0 {
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, s.UserTTL)
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, s.UserTTL)
			}
			*want = ttlOf(int(fd))
		})
	}))
}

// ttlSettings are IP_TTL, IP_MINTTL, IPV6_UNICAST_HOPS and IPV6_MINHOPCOUNT of a socket. -1
// means that the socket has no such option.
type ttlSettings [4]int

func ttlOf(fd int) (s ttlSettings) {
	for i, o := range []socketOption{
		{unix.IPPROTO_IP, unix.IP_TTL}, {unix.IPPROTO_IP, unix.IP_MINTTL},
		{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS}, {unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT},
	} {
		var err error
		if s[i], err = unix.GetsockoptInt(fd, o.level, o.name); err != nil {
			s[i] = -1
		}
	}
	return s
}

// optionsOf returns the options of a listening socket that a drain could change.
func optionsOf(t *testing.T, l *Listener) map[string]int {
	t.Helper()
	values := make(map[string]int)
	err := l.intake.raw.Control(func(fd uintptr) {
		for name, o := range map[string]socketOption{
			"IP_TTL": {unix.IPPROTO_IP, unix.IP_TTL}, "IP_MINTTL": {unix.IPPROTO_IP, unix.IP_MINTTL},
			"IP_TOS": {unix.IPPROTO_IP, unix.IP_TOS}, "IP_RECVTTL": {unix.IPPROTO_IP, unix.IP_RECVTTL},
			"IP_TRANSPARENT": {unix.IPPROTO_IP, unix.IP_TRANSPARENT}, "IP_FREEBIND": {unix.IPPROTO_IP, unix.IP_FREEBIND},
			"IPV6_UNICAST_HOPS": {unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS}, "IPV6_MINHOPCOUNT": {unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT},
			"IPV6_TCLASS": {unix.IPPROTO_IPV6, unix.IPV6_TCLASS}, "IPV6_RECVHOPLIMIT": {unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT},
			"IPV6_V6ONLY": {unix.IPPROTO_IPV6, unix.IPV6_V6ONLY}, "SO_RXQ_OVFL": {unix.SOL_SOCKET, unix.SO_RXQ_OVFL},
			"SO_MARK": {unix.SOL_SOCKET, unix.SO_MARK}, "SO_PRIORITY": {unix.SOL_SOCKET, unix.SO_PRIORITY},
			"SO_RCVBUF": {unix.SOL_SOCKET, unix.SO_RCVBUF}, "SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE},
			"SO_REUSEPORT": {unix.SOL_SOCKET, unix.SO_REUSEPORT}, "SO_LOCK_FILTER": {unix.SOL_SOCKET, unix.SO_LOCK_FILTER},
			"TCP_SYNCNT": {unix.IPPROTO_TCP, unix.TCP_SYNCNT}, "TCP_DEFER_ACCEPT": {unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT},
			"TCP_MAXSEG": {unix.IPPROTO_TCP, unix.TCP_MAXSEG}, "TCP_FASTOPEN": {unix.IPPROTO_TCP, unix.TCP_FASTOPEN},
			"TCP_SAVE_SYN": {unix.IPPROTO_TCP, unix.TCP_SAVE_SYN}, "TCP_USER_TIMEOUT": {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT},
		} {
			if v, err := unix.GetsockoptInt(int(fd), o.level, o.name); err == nil {
				values[name] = v
			}
		}
	})
	require.NoError(t, err)
	values["filter"] = wayOf(t, l.intake.raw).filter
	return values
}

// A server is what runs in the process of a replica.
type server struct {
	spec     replicaSpec
	shards   *Shards
	want     ttlSettings
	accepted atomic.Int64
	odd      atomic.Int64 // connections with other TTL settings than those of the user
	inHand   atomic.Int64 // connections that are being answered
	served   chan error
	hangs    chan struct{}
}

// newServer listens and serves.
func newServer(t *testing.T, spec replicaSpec) *server {
	t.Helper()
	s := &server{spec: spec, served: make(chan error, 1), hangs: make(chan struct{})}
	var err error
	s.shards, err = ListenShards(t.Context(), spec.Network, spec.Address, spec.Shards, spec.options(&s.want)...)
	require.NoError(t, err)
	t.Cleanup(func() { s.shards.Close() })
	go func() { s.served <- s.shards.Serve(s.serve) }()
	return s
}

// serveReplica runs a replica.
func serveReplica(t *testing.T) {
	var spec replicaSpec
	require.NoError(t, json.Unmarshal([]byte(os.Getenv(replicaEnv)), &spec))
	spec.become(t)
	s := newServer(t, spec)
	fmt.Println("done listen", s.shards.Addr())
	commands := map[string]func(*testing.T){
		"stop":  func(t *testing.T) { s.drain(t); s.close(t); s.answered(t) },
		"drain": func(t *testing.T) { s.drain(t); s.answered(t) },
		"close": s.close,
		"hang":  s.hang,
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		commands[in.Text()](t)
		fmt.Println("done", in.Text(), s.accepted.Load(), s.odd.Load())
	}
}

func (s *server) serve(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			<-s.hangs
		}
		if err != nil {
			return err
		}
		s.accepted.Add(1)
		s.inHand.Add(1)
		go s.answer(c.(*net.TCPConn))
	}
}

func (s *server) answer(c *net.TCPConn) {
	defer s.inHand.Add(-1)
	defer c.Close()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			if ttlOf(int(fd)) != s.want {
				s.odd.Add(1)
			}
		})
	}
	if err != nil {
		s.odd.Add(1)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
		c.Write([]byte{s.spec.ID})
	}
}

// drain drains, and checks that the drain has used the way that the test means.
func (s *server) drain(t *testing.T) {
	require.NoError(t, s.shards.Drain(within(t, patience)))
	for l := range s.shards.All() {
		w := wayOf(t, l.intake.raw)
		if s.spec.TTL {
			require.Equal(t, maxTTL, max(w.ttl, w.hops))
		} else if s.spec.UID == 0 { // others may set no filter on some kernels
			require.Equal(t, len(dropSYN), w.filter)
		}
	}
}

func (s *server) close(t *testing.T) {
	require.NoError(t, s.shards.Close())
	require.ErrorIs(t, <-s.served, net.ErrClosed)
}

// answered waits until every client that was accepted has its answer.
func (s *server) answered(t *testing.T) {
	require.Eventually(t, func() bool { return s.inHand.Load() == 0 }, patience, time.Millisecond)
}

// hang begins a drain that does not end, because a connection waits for Accept.
func (s *server) hang(t *testing.T) {
	for l := range s.shards.All() {
		require.NoError(t, l.SetDeadline(time.Now()))
	}
	require.Eventually(t, func() bool {
		st, err := s.shards.Stats()
		return err == nil && st.Queued > 0
	}, patience, time.Millisecond)
	go s.shards.Drain(t.Context())
	for l := range s.shards.All() {
		require.Eventually(t, func() bool {
			w := wayOf(t, l.intake.raw)
			return w.filter == len(dropSYN) || max(w.ttl, w.hops) == maxTTL
		}, patience, time.Millisecond)
	}
}

// A replica is the process of a server, as the test sees it.
type replica struct {
	replicaSpec
	cmd           *exec.Cmd
	in            io.WriteCloser
	lines         chan string // closed at the end of its output
	accepted, odd int         // as of its last answer
}

// startReplica starts a replica. It does not wait until the replica listens.
func startReplica(t *testing.T, spec replicaSpec) *replica {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	text, err := json.Marshal(spec)
	require.NoError(t, err)
	r := &replica{replicaSpec: spec, lines: make(chan string, 100)}
	r.cmd = exec.Command(self, "-test.run=^TestRollingRestarts$", "-test.timeout=0")
	r.cmd.Env = append(os.Environ(), replicaEnv+"="+string(text),
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise it ends a second later under -race
	r.cmd.Stderr = os.Stderr
	r.in, err = r.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := r.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, r.cmd.Start())
	go func() {
		defer close(r.lines)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			r.lines <- lines.Text()
		}
	}()
	t.Cleanup(r.kill)
	return r
}

// say sends a command.
func (r *replica) say(t *testing.T, command string) {
	t.Helper()
	_, err := io.WriteString(r.in, command+"\n")
	require.NoError(t, err)
}

// hear waits for the answer to a command.
func (r *replica) hear(t *testing.T, command string) {
	t.Helper()
	var before []string
	for end := time.After(2 * patience); ; {
		select {
		case line, ok := <-r.lines:
			if !ok {
				t.Fatalf("replica %d has ended before %q:\n%s", r.ID, command, strings.Join(before, "\n"))
			}
			rest, found := strings.CutPrefix(line, "done "+command+" ")
			if !found {
				before = append(before, line)
				continue
			}
			if command == "listen" {
				r.Address = rest
				return
			}
			_, err := fmt.Sscan(rest, &r.accepted, &r.odd)
			require.NoError(t, err)
			return
		case <-end:
			t.Fatalf("replica %d has not answered %q", r.ID, command)
		}
	}
}

// end lets the process of a replica that has closed end. The process checks that nothing is
// left behind, see TestMain.
func (r *replica) end(t *testing.T) {
	t.Helper()
	require.NoError(t, r.in.Close())
	var said []string
	for line := range r.lines {
		said = append(said, line)
	}
	require.NoError(t, r.cmd.Wait(), "replica %d:\n%s", r.ID, strings.Join(said, "\n"))
}

// kill kills the process, unless it has ended.
func (r *replica) kill() {
	if r.cmd.ProcessState != nil {
		return
	}
	r.cmd.Process.Kill()
	for range r.lines {
	}
	r.cmd.Wait()
}

// A fleet is a group of replicas on one address, and the clients of it.
type fleet struct {
	spec     replicaSpec
	hosts    []string // where the clients connect
	members  []*replica
	*busy         // nil before start
	last     byte // the last ID
	accepted int  // by the replicas that have ended
	odd      int
	stalled  []int // clients with a slow connect, for each stop
	uneven   []string
}

// add starts n replicas and waits until all listen.
func (f *fleet) add(t *testing.T, n int) {
	t.Helper()
	var started []*replica
	for range n {
		f.last++
		spec := f.spec
		spec.ID = f.last
		r := startReplica(t, spec)
		f.members = append(f.members, r)
		if strings.HasSuffix(spec.Address, ":0") { // the others need its port
			r.hear(t, "listen")
			f.spec.Address = r.Address
		} else {
			started = append(started, r)
		}
	}
	for _, r := range started {
		r.hear(t, "listen")
	}
}

// start starts the clients, and measures them while nothing stops. members are those that
// get clients.
func (f *fleet) start(t *testing.T, members []*replica) {
	t.Helper()
	f.busy = newBusy(t, f.hosts, f.spec.Address)
	f.settle(t, time.Now())
	f.even(t, "in the control", members)
	f.calibrate()
}

// addr returns the address of the group.
func (f *fleet) addr(t *testing.T) net.Addr {
	t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", f.spec.Address)
	require.NoError(t, err)
	return addr
}

// during counts the clients that stall while act runs. It waits for every client that act
// may have delayed, and returns when act had ended.
func (f *fleet) during(t *testing.T, act func()) (end time.Time) {
	t.Helper()
	before := f.slow()
	act()
	end = time.Now()
	f.settle(t, end)
	f.stalled = append(f.stalled, f.slow()-before)
	return end
}

// stop drains and closes members at the same time.
func (f *fleet) stop(t *testing.T, victims ...*replica) {
	t.Helper()
	f.during(t, func() {
		for _, v := range victims {
			v.say(t, "stop")
		}
		for _, v := range victims {
			v.hear(t, "stop")
		}
	})
	for _, v := range victims {
		f.gone(v)
		v.end(t)
	}
}

// kill kills a member. With loses a client may be lost if it connected before that.
func (f *fleet) kill(t *testing.T, v *replica, loses bool) {
	t.Helper()
	end := f.during(t, v.kill)
	f.gone(v)
	if loses {
		f.forgive(end)
	}
}

// gone removes a member.
func (f *fleet) gone(r *replica) {
	f.members = slices.DeleteFunc(f.members, func(m *replica) bool { return m == r })
	f.accepted += r.accepted
	f.odd += r.odd
}

// even notes a member whose share of the next clients is more than six standard deviations
// from that of a uniform choice among the listeners.
func (f *fleet) even(t *testing.T, when string, members []*replica) {
	t.Helper()
	listeners := 0
	for _, m := range members {
		listeners += m.Shards
	}
	n := max(200, 60*len(members))
	before := f.sharesNow()
	f.more(t, n)
	after := f.sharesNow()
	total := 0
	for _, m := range members {
		total += after[m.ID] - before[m.ID]
	}
	var parts []int
	wrong := total < n
	for _, m := range members {
		got := after[m.ID] - before[m.ID]
		parts = append(parts, got)
		p := float64(m.Shards) / float64(listeners)
		want := p * float64(total)
		wrong = wrong || math.Abs(float64(got)-want) > 6*math.Sqrt(want*(1-p))+1
	}
	if wrong {
		f.uneven = append(f.uneven, fmt.Sprintf("%s: %v of %d", when, parts, n))
	}
}

// finish ends the clients and the members, and requires that everything was right.
func (f *fleet) finish(t *testing.T) {
	t.Helper()
	f.halt()
	if rollingRounds(t) > 1 { // this takes a second
		requireNoneHalfOpen(t, f.addr(t))
	}
	for len(f.members) > 0 {
		m := f.members[0]
		m.say(t, "stop")
		m.hear(t, "stop")
		f.gone(m)
		m.end(t)
	}
	t.Logf("%d answered, the slowest connect of the control %v, of all %v, %d SYNs sent again; stalled at each stop: %v",
		f.answered, f.limit-stallTime, f.longest, kernelCounter(t, "TCPSynRetrans"), f.stalled)
	if len(f.losses) > 0 {
		t.Errorf("%d clients lost, the first: %v", len(f.losses), f.losses[0].err)
	}
	if f.stalls > 0 {
		t.Errorf("%d clients stalled", f.stalls)
	}
	if f.odd > 0 {
		t.Errorf("%d connections did not have the TTL settings of the user", f.odd)
	}
	if len(f.uneven) > 0 {
		t.Errorf("uneven %d times, the first %s", len(f.uneven), f.uneven[0])
	}
}

// finishExactly is like finish, and requires that each accepted connection was that of a
// client.
func (f *fleet) finishExactly(t *testing.T) {
	t.Helper()
	f.finish(t)
	require.Equal(t, f.answered, f.accepted, "accepted connections that are not of the clients")
}

// requireNoneHalfOpen requires that the handshakes of the port end, although no client
// connects. A client that is gone answers a SYN-ACK with a reset.
func requireNoneHalfOpen(t *testing.T, addr net.Addr) {
	t.Helper()
	require.Eventually(t, func() bool { return synReceived(t, addr) == 0 }, patience, time.Millisecond, "half-open handshakes are left")
}

// stallTime is what the connect of a client takes longer than any in the control if its SYN
// was dropped. The kernel sends the SYN again after a second.
const stallTime = 800 * time.Millisecond

// busy is a number of clients that connect, send a request, read the answer, and begin
// again.
type busy struct {
	quit chan struct{}
	wait sync.WaitGroup

	mu       sync.Mutex
	began    []time.Time  // when the last request that has ended began, for each client
	shares   map[byte]int // answers, by replica
	answered int
	longest  time.Duration // of all connects since the last calibrate
	limit    time.Duration // a longer connect is a stall; 0 before calibrate
	stalls   int
	losses   []loss
}

// A loss is a request without an answer.
type loss struct {
	began time.Time
	err   error
}

// newBusy starts 24 clients. They connect to the port of address on hosts.
func newBusy(t *testing.T, hosts []string, address string) *busy {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	b := &busy{quit: make(chan struct{}), began: make([]time.Time, 24), shares: make(map[byte]int)}
	t.Cleanup(b.halt)
	pause := 4 * time.Millisecond // other tests need the processor too
	if rollingRounds(t) > 1 {
		pause = time.Millisecond
	}
	for i := range b.began {
		b.wait.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for {
				select {
				case <-b.quit:
					return
				case <-tick.C:
					b.request(i, net.JoinHostPort(hosts[i%len(hosts)], port))
				}
			}
		})
	}
	return b
}

func (b *busy) request(client int, address string) {
	began := time.Now()
	c, err := net.DialTimeout("tcp", address, patience)
	took := time.Since(began)
	var by [1]byte
	again := err != nil
	if err == nil {
		if took > stallTime {
			again = sentAgain(c.(*net.TCPConn))
		}
		c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
		c.SetDeadline(time.Now().Add(patience))
		if _, err = c.Write([]byte{'?'}); err == nil {
			_, err = io.ReadFull(c, by[:])
		}
		c.Close()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.began[client] = began
	b.longest = max(b.longest, took)
	if b.limit > 0 && took > b.limit && again {
		b.stalls++
	}
	if err != nil {
		b.losses = append(b.losses, loss{began, err})
		return
	}
	b.answered++
	b.shares[by[0]]++
}

// sentAgain reports whether the client of c has sent anything again, such as its SYN. If it
// has not, its connect was slow because the machine is busy.
func sentAgain(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	n, err := rawInt(raw, func(fd int) (int, error) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, err
		}
		return int(info.Total_retrans), nil
	})
	return err != nil || n > 0
}

// calibrate ends a control: a connect that takes longer than the longest one so far by
// stallTime is a stall from now on.
func (b *busy) calibrate() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit = b.longest + stallTime
	b.longest = 0
}

// settle waits until each client has ended a request that began after since.
func (b *busy) settle(t *testing.T, since time.Time) {
	t.Helper()
	require.True(t, b.settled(since, 2*patience), "a client has no answer")
}

// settled is like settle. It reports whether that happens within limit.
func (b *busy) settled(since time.Time, limit time.Duration) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); time.Now().Before(end); <-tick.C {
		b.mu.Lock()
		waits := slices.ContainsFunc(b.began, func(began time.Time) bool { return !began.After(since) })
		b.mu.Unlock()
		if !waits {
			return true
		}
	}
	return false
}

// more waits for n more answers.
func (b *busy) more(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.answered
	}
	want := count() + n
	require.Eventually(t, func() bool { return count() >= want }, 2*patience, time.Millisecond)
}

// forgive forgets the lost requests that began before end.
func (b *busy) forgive(end time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.losses = slices.DeleteFunc(b.losses, func(l loss) bool { return l.began.Before(end) })
}

func (b *busy) slow() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stalls
}

func (b *busy) sharesNow() map[byte]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.shares)
}

// halt ends the clients. It may be called again.
func (b *busy) halt() {
	select {
	case <-b.quit:
	default:
		close(b.quit)
	}
	b.wait.Wait()
}

// rollingRounds returns the factor of ACCEPTQ_ROUNDS: more than 1 asks for all rows.
func rollingRounds(t *testing.T) int {
	t.Helper()
	text := os.Getenv("ACCEPTQ_ROUNDS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return max(n, 1)
}
