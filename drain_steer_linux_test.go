package acceptq

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
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

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
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
				sys.Real.AttachFilter(int(fd), &unix.SockFprog{Len: 1, Filter: &pass})
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
	for i, o := range []testkit.SocketOption{
		{Level: unix.IPPROTO_IP, Name: unix.IP_TTL}, {Level: unix.IPPROTO_IP, Name: unix.IP_MINTTL},
		{Level: unix.IPPROTO_IPV6, Name: unix.IPV6_UNICAST_HOPS}, {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_MINHOPCOUNT},
	} {
		var err error
		if s[i], err = unix.GetsockoptInt(fd, o.Level, o.Name); err != nil {
			s[i] = -1
		}
	}
	return s
}

// optionsOf returns the options of a listening socket that a drain could change.
func optionsOf(t *testing.T, l *Listener) map[string]int {
	t.Helper()
	values := make(map[string]int)
	err := l.intake.Raw.Control(func(fd uintptr) {
		for name, o := range map[string]testkit.SocketOption{
			"IP_TTL": {Level: unix.IPPROTO_IP, Name: unix.IP_TTL}, "IP_MINTTL": {Level: unix.IPPROTO_IP, Name: unix.IP_MINTTL},
			"IP_TOS": {Level: unix.IPPROTO_IP, Name: unix.IP_TOS}, "IP_RECVTTL": {Level: unix.IPPROTO_IP, Name: unix.IP_RECVTTL},
			"IP_TRANSPARENT": {Level: unix.IPPROTO_IP, Name: unix.IP_TRANSPARENT}, "IP_FREEBIND": {Level: unix.IPPROTO_IP, Name: unix.IP_FREEBIND},
			"IPV6_UNICAST_HOPS": {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_UNICAST_HOPS}, "IPV6_MINHOPCOUNT": {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_MINHOPCOUNT},
			"IPV6_TCLASS": {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_TCLASS}, "IPV6_RECVHOPLIMIT": {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_RECVHOPLIMIT},
			"IPV6_V6ONLY": {Level: unix.IPPROTO_IPV6, Name: unix.IPV6_V6ONLY}, "SO_RXQ_OVFL": {Level: unix.SOL_SOCKET, Name: unix.SO_RXQ_OVFL},
			"SO_MARK": {Level: unix.SOL_SOCKET, Name: unix.SO_MARK}, "SO_PRIORITY": {Level: unix.SOL_SOCKET, Name: unix.SO_PRIORITY},
			"SO_RCVBUF": {Level: unix.SOL_SOCKET, Name: unix.SO_RCVBUF}, "SO_KEEPALIVE": {Level: unix.SOL_SOCKET, Name: unix.SO_KEEPALIVE},
			"SO_REUSEPORT": {Level: unix.SOL_SOCKET, Name: unix.SO_REUSEPORT}, "SO_LOCK_FILTER": {Level: unix.SOL_SOCKET, Name: unix.SO_LOCK_FILTER},
			"TCP_SYNCNT": {Level: unix.IPPROTO_TCP, Name: unix.TCP_SYNCNT}, "TCP_DEFER_ACCEPT": {Level: unix.IPPROTO_TCP, Name: unix.TCP_DEFER_ACCEPT},
			"TCP_MAXSEG": {Level: unix.IPPROTO_TCP, Name: unix.TCP_MAXSEG}, "TCP_FASTOPEN": {Level: unix.IPPROTO_TCP, Name: unix.TCP_FASTOPEN},
			"TCP_SAVE_SYN": {Level: unix.IPPROTO_TCP, Name: unix.TCP_SAVE_SYN}, "TCP_USER_TIMEOUT": {Level: unix.IPPROTO_TCP, Name: unix.TCP_USER_TIMEOUT},
		} {
			if v, err := unix.GetsockoptInt(int(fd), o.Level, o.Name); err == nil {
				values[name] = v
			}
		}
	})
	require.NoError(t, err)
	values["filter"] = wayOf(t, l.intake.Raw).filter
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
	require.NoError(t, s.shards.Drain(testkit.Within(t, testkit.Patience)))
	for l := range s.shards.All() {
		w := wayOf(t, l.intake.Raw)
		if s.spec.TTL {
			require.Equal(t, intake.MaxTTL, max(w.ttl, w.hops))
		} else if s.spec.UID == 0 { // others may set no filter on some kernels
			require.Equal(t, len(intake.DropSYN), w.filter)
		}
	}
}

func (s *server) close(t *testing.T) {
	require.NoError(t, s.shards.Close())
	require.ErrorIs(t, <-s.served, net.ErrClosed)
}

// answered waits until every client that was accepted has its answer.
func (s *server) answered(t *testing.T) {
	require.Eventually(t, func() bool { return s.inHand.Load() == 0 }, testkit.Patience, time.Millisecond)
}

// hang begins a drain that does not end, because a connection waits for Accept.
func (s *server) hang(t *testing.T) {
	for l := range s.shards.All() {
		require.NoError(t, l.SetDeadline(time.Now()))
	}
	require.Eventually(t, func() bool {
		st, err := s.shards.Stats()
		return err == nil && st.Queued > 0
	}, testkit.Patience, time.Millisecond)
	go s.shards.Drain(t.Context())
	for l := range s.shards.All() {
		require.Eventually(t, func() bool {
			w := wayOf(t, l.intake.Raw)
			return w.filter == len(intake.DropSYN) || max(w.ttl, w.hops) == intake.MaxTTL
		}, testkit.Patience, time.Millisecond)
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
	for end := time.After(2 * testkit.Patience); ; {
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

// even notes a member whose share of the next clients is not that of a uniform choice.
func (f *fleet) even(t *testing.T, when string, members []*replica) {
	t.Helper()
	if shares, even := f.share(t, members); !even {
		f.uneven = append(f.uneven, fmt.Sprintf("%s: %v", when, shares))
	}
}

// evenSoon is even for a group of which a drain that goes on has yet to notice a change.
func (f *fleet) evenSoon(t *testing.T, when string, members []*replica) {
	t.Helper()
	for deadline := time.Now().Add(testkit.Patience); time.Now().Before(deadline); {
		if _, even := f.share(t, members); even {
			return
		}
	}
	f.even(t, when, members)
}

// share returns how many of the next clients each of members gets, and whether each share is
// within six standard deviations of that of a uniform choice among the listeners.
func (f *fleet) share(t *testing.T, members []*replica) (shares []int, even bool) {
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
	even = total >= n
	for _, m := range members {
		got := after[m.ID] - before[m.ID]
		shares = append(shares, got)
		p := float64(m.Shards) / float64(listeners)
		want := p * float64(total)
		even = even && math.Abs(float64(got)-want) <= 6*math.Sqrt(want*(1-p))+1
	}
	return shares, even
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
		f.answered, f.limit-stallTime, f.longest, testkit.KernelCounter(t, "TCPSynRetrans"), f.stalled)
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
	require.Eventually(t, func() bool { return testkit.SynReceived(t, addr) == 0 }, testkit.Patience, time.Millisecond, "half-open handshakes are left")
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
	c, err := net.DialTimeout("tcp", address, testkit.Patience)
	took := time.Since(began)
	var by [1]byte
	again := err != nil
	if err == nil {
		if took > stallTime {
			again = sentAgain(c.(*net.TCPConn))
		}
		c.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
		c.SetDeadline(time.Now().Add(testkit.Patience))
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
	n, err := endpoint.RawInt(raw, func(fd int) (int, error) {
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
	require.True(t, b.settled(since, 2*testkit.Patience), "a client has no answer")
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
	require.Eventually(t, func() bool { return count() >= want }, 2*testkit.Patience, time.Millisecond)
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
func rollingRounds(*testing.T) int { return testkit.Factor() }

// shuffledGroup returns n members of a new group whose order in the kernel is random.
func shuffledGroup(t *testing.T, network, address string, n int) (members []*Listener) {
	t.Helper()
	join := func() *Listener {
		l, err := Listen(t.Context(), network, address, WithReusePort(), WithoutSteering(), WithBacklog(64))
		require.NoError(t, err)
		address = net.JoinHostPort(addressHost(address), strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
		return l
	}
	for range n {
		members = append(members, join())
	}
	for range 2 * n {
		i := rand.IntN(n)
		if n > 1 {
			require.NoError(t, members[i].Close())
		}
		if n > 1 {
			members[i] = join()
		}
	}
	t.Cleanup(func() {
		for _, l := range members {
			l.Close()
		}
	})
	return members
}

func addressHost(address string) string {
	host, _, _ := net.SplitHostPort(address)
	return host
}

// indexOf returns the index of a member: a program sends a client there. dial is a host.
func indexOf(t *testing.T, members []*Listener, l *Listener, dial string) int {
	t.Helper()
	to := net.JoinHostPort(dial, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	for i := range members {
		require.NoError(t, intake.AttachTo(&sys.Real, l.intake.Raw, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(i)}}))
		c, err := net.DialTimeout("tcp", to, testkit.Patience)
		require.NoError(t, err)
		for _, m := range members {
			s, err := m.Stats()
			require.NoError(t, err)
			if s.Queued == 0 {
				continue
			}
			a, err := m.Accept()
			require.NoError(t, err)
			require.Equal(t, c.LocalAddr().String(), a.RemoteAddr().String())
			a.Close()
			if m == l {
				c.Close()
				return i
			}
		}
		c.Close()
	}
	t.Fatal("no index leads to the listener")
	return -1
}

// A question finds all members that answer, and only these, whatever the order of the group.
// It leaves nothing behind: no connection, no half-open handshake, no option.
func TestQuestion(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		for _, row := range []struct{ name, network, address, dial string }{
			{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
			{"IPv4 wildcard", "tcp4", "0.0.0.0:0", "127.0.0.1"},
			{"IPv6", "tcp6", "[::1]:0", "::1"},
			{"IPv6 wildcard", "tcp6", "[::]:0", "::1"},
			{"both families", "tcp", "[::]:0", "127.0.0.1"},
		} {
			for _, n := range []int{2, 3, 8, 70} {
				t.Run(fmt.Sprintf("%s, %d members", row.name, n), func(t *testing.T) {
					for range rounds(3) {
						members := shuffledGroup(t, row.network, row.address, n)
						own := members[rand.IntN(n)]
						index := indexOf(t, members, own, row.dial)
						want := []int{}
						for i := range n {
							if i != index {
								want = append(want, i)
							}
						}
						own.intake.Steers = true
						k, key, as, err := intake.GroupOf(t.Context(), intakes([]*Listener{own}))
						require.NoError(t, err)
						s := &intake.Steering{Calls: k, Groups: new(intake.Groups), Key: key, Own: as}
						former := wayOf(t, own.intake.Raw)
						began := time.Now()
						answers, err := s.Ask(t.Context(), n, as)
						t.Logf("%d members: %v", n, time.Since(began))
						require.NoError(t, err)
						require.Equal(t, want, answers)
						require.Equal(t, former, wayOf(t, own.intake.Raw))
						require.Zero(t, testkit.SynReceived(t, own.Addr()))
						for _, m := range members {
							stats, err := m.Stats()
							require.NoError(t, err)
							require.Zero(t, stats.Queued)
						}
						if n < 3 {
							continue
						}
						// A member that drains is silent. So is one whose queue is full.
						other := members[(slices.Index(members, own)+1)%n]
						silent := indexOf(t, members, other, row.dial)
						(&intake.Draining{L: &other.intake}).Begin(false)
						answers, err = s.Ask(t.Context(), n, as)
						require.NoError(t, err)
						require.Equal(t, slices.DeleteFunc(slices.Clone(want), func(i int) bool { return i == silent }), answers)
					}
				})
			}
		}
	})
}

// A generation has the listeners of one process of a rolling restart.
type generation struct {
	shards *Shards
	done   chan error
}

// newGeneration opens n listeners at address. They answer each client with one byte.
func newGeneration(t *testing.T, k *sys.Calls, network, address string, n int, opts ...Option) *generation {
	t.Helper()
	s, err := listenShards(k, t.Context(), network, address, n, append([]Option{WithReusePort(), WithBacklog(1024)}, opts...))
	require.NoError(t, err)
	g := &generation{s, make(chan error, 1)}
	go func() {
		g.done <- s.Serve(func(ln net.Listener) error { return answerEach(ln, func() {}) })
	}()
	return g
}

// answerEach answers each client with one byte until ln is closed.
func answerEach(ln net.Listener, accepted func()) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		accepted()
		c.Write([]byte{'!'})
		c.Close()
	}
}

// end drains and closes.
func (g *generation) end(t *testing.T) {
	t.Helper()
	require.NoError(t, g.shards.Drain(testkit.Within(t, testkit.Patience)))
	g.close(t)
}

func (g *generation) close(t *testing.T) {
	t.Helper()
	require.NoError(t, g.shards.Close())
	require.ErrorIs(t, <-g.done, net.ErrClosed)
}

// A throng is a number of clients that connect to an address repeatedly.
type throng struct {
	stop     chan struct{}
	wait     sync.WaitGroup
	ok, lost atomic.Int64
	failure  atomic.Value
}

func newThrong(n int, address string) *throng {
	th := &throng{stop: make(chan struct{})}
	for range n {
		th.wait.Go(func() {
			for {
				select {
				case <-th.stop:
					return
				default:
				}
				if err := ask(address); err != nil {
					th.lost.Add(1)
					th.failure.Store(err)
					return
				}
				th.ok.Add(1)
			}
		})
	}
	return th
}

// ask runs one client.
func ask(address string) error {
	c, err := net.DialTimeout("tcp", address, testkit.Patience)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(testkit.Patience))
	_, err = c.Read(make([]byte, 1))
	return err
}

func (th *throng) end(t *testing.T) (answered int64) {
	t.Helper()
	close(th.stop)
	th.wait.Wait()
	require.Zero(t, th.lost.Load(), "%v", th.failure.Load())
	return th.ok.Load()
}

// answers waits until n more clients have their answer.
func (th *throng) answers(t *testing.T, n int64) {
	t.Helper()
	want := th.ok.Load() + n
	require.Eventually(t, func() bool { return th.ok.Load() >= want || th.lost.Load() > 0 }, testkit.Patience, time.Millisecond)
}

// Generations replace each other under constant load. No client is lost, and very few have
// to retransmit their SYN. The kernel counts the retransmissions.
func TestSteeredGenerations(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, way way) {
		for _, row := range []struct {
			name, network, address, dial string
			sizes                        []int
			generations                  int
			opts                         []Option
			most                         int64 // the maximum of retransmitted SYNs
		}{
			{"control: without steering", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{1}, 3, []Option{WithoutSteering()}, 0},
			{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{1}, 50, nil, 5},
			{"IPv6", "tcp6", "[::1]:0", "::1", []int{1}, 10, nil, 3},
			{"wildcard of both families, a client of IPv4", "tcp", ":0", "127.0.0.1", []int{1}, 10, nil, 3},
			{"IPv4 wildcard, 3 and 8 and 2 shards", "tcp4", ":0", "127.0.0.1", []int{3, 8, 2}, 9, nil, 3},
			// When several listeners and one other remain, each close leaves a short gap.
			{"IPv6, 4 and 1 shards", "tcp6", "[::1]:0", "::1", []int{4, 1}, 8, nil, 20},
			{"64 shards", "tcp4", "127.0.0.1:0", "127.0.0.1", []int{64}, 3, nil, 3},
		} {
			if way.filter == 0 && slices.Max(row.sizes) > 1 {
				continue // steering does not depend on what drops the SYNs
			}
			t.Run(row.name, func(t *testing.T) {
				if strings.Contains(row.network+row.address, "6") || row.network == "tcp" {
					haveIPv6(t)
				}
				g := newGeneration(t, &k, row.network, row.address, row.sizes[0], row.opts...)
				address := g.shards.Addr().String()
				port := g.shards.Addr().(*net.TCPAddr).Port
				clients := newThrong(8, net.JoinHostPort(row.dial, strconv.Itoa(port)))
				clients.answers(t, 50)
				before := testkit.KernelCounter(t, "TCPSynRetrans")
				generations := rounds(row.generations)
				if generations > 20 && way.filter == 0 {
					generations = 10
				}
				sentAgain := func() int64 { return testkit.KernelCounter(t, "TCPSynRetrans") - before }
				control := row.opts != nil // on a busy machine it may stall few clients in a few generations
				enough := int64(generations / 2)
				for i := 0; i < generations || control && sentAgain() <= enough && i < 20*generations; i++ {
					next := newGeneration(t, &k, row.network, address, row.sizes[(i+1)%len(row.sizes)], row.opts...)
					g.end(t)
					g = next
					clients.answers(t, 20)
				}
				answered := clients.end(t)
				again := sentAgain()
				t.Logf("%d generations: %d answered, none lost, %d SYNs sent again", generations, answered, again)
				if control {
					require.Greater(t, again, enough)
				} else {
					require.LessOrEqual(t, again, row.most)
				}
				g.close(t)
			})
		}
	})
}

// Each close removes the listener from its group a moment before it removes it from the
// table of listeners. A SYN that finds the listener there at that moment must not go to it.
// The newest IPv4 listener of an address is the first in the table, so clients may meet each
// of these closes. In the control the kernel refuses what Close does about it.
func TestClosesStallNobody(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		const closes = 100
		stalled := func(k sys.Calls) (clients int) {
			members := newMembers(t, &k, "127.0.0.1:0", 2) // the closes do not move them
			address := members[0].Addr().String()
			g := newGeneration(t, &k, "tcp4", address, closes)
			require.NoError(t, g.shards.Drain(testkit.Within(t, testkit.Patience)))
			c := newConnects(t, 3, address)
			require.Eventually(t, func() bool { return c.all.Load() > 10 }, testkit.Patience, time.Millisecond)
			g.close(t)
			c.end()
			return int(c.stalled.Load())
		}
		refused := sys.Real
		refused.SetsockoptInt = func(fd, level, name, value int) error {
			if level == unix.SOL_SOCKET && name == unix.SO_BINDTOIFINDEX {
				return unix.EPERM // kernels before 5.7, without CAP_NET_RAW
			}
			return sys.Real.SetsockoptInt(fd, level, name, value)
		}
		control, real, n := 0, 0, 0
		for ; n < rounds(20) || control == 0 && n < rounds(100); n++ {
			control += stalled(refused)
			real += stalled(sys.Real)
		}
		t.Logf("%d closes stalled %d clients, and %d where the kernel refuses", closes*n, real, control)
		require.Zero(t, real)
		if control == 0 {
			t.Log("this proves nothing: the control has stalled nobody")
		}
	})
}

// connects is a number of clients that connect and close repeatedly.
type connects struct {
	stop         atomic.Bool
	wait         sync.WaitGroup
	all, stalled atomic.Int64
}

func newConnects(t *testing.T, n int, address string) *connects {
	c := new(connects)
	for range n {
		c.wait.Go(func() {
			for !c.stop.Load() {
				began := time.Now()
				conn, err := net.DialTimeout("tcp", address, testkit.Patience)
				if err != nil {
					t.Error(err)
					return
				}
				if time.Since(began) > stallTime && sentAgain(conn.(*net.TCPConn)) {
					c.stalled.Add(1)
				}
				c.all.Add(1)
				conn.(*net.TCPConn).SetLinger(0) // leave no port in TIME_WAIT
				conn.Close()
			}
		})
	}
	return c
}

func (c *connects) end() {
	c.stop.Store(true)
	c.wait.Wait()
}

// What Close does to the socket for [TestClosesStallNobody] cannot be undone, so it must not
// happen if the socket may have another holder.
func TestCloseLeavesASharedSocketAlone(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		control := WithControl(func(_, _ string, c syscall.RawConn) error { return c.Control(func(uintptr) {}) })
		for name, row := range map[string]struct {
			opts   []Option
			before func(t *testing.T, l *Listener)         // the drain
			after  func(t *testing.T, l *Listener, fd int) // the drain; fd is another descriptor of the socket
			bound  bool
		}{
			"no other holder is known": {bound: true},
			"WithControl":              {bound: true, opts: []Option{control}},
			"TCPListener":              {before: func(_ *testing.T, l *Listener) { l.TCPListener() }},
			"SyscallConn": {before: func(t *testing.T, l *Listener) {
				_, err := l.SyscallConn()
				require.NoError(t, err)
			}},
			"File during another drain": {after: func(t *testing.T, l *Listener, _ int) {
				(&intake.Draining{L: &l.intake}).Begin(false)
				f, err := l.File()
				require.NoError(t, err)
				require.NoError(t, f.Close())
			}},
			"another holder has let clients in": {after: func(t *testing.T, l *Listener, fd int) {
				_, err := intake.Lift(&sys.Real, fd, nil)
				require.NoError(t, err)
			}},
		} {
			t.Run(name, func(t *testing.T) {
				members := newMembers(t, &sys.Real, "127.0.0.1:0", 2, row.opts...)
				l := members[0].Listener
				if row.before != nil {
					row.before(t, l)
				}
				require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
				fd := secretly(t, l)
				if row.after != nil {
					row.after(t, l, fd)
				}
				require.NoError(t, l.Close())
				require.Equal(t, row.bound, isBound(t, fd))
			})
		}
	})
}

// A drain that has not ended has not looked for other holders yet.
func TestCloseDuringADrainBindsNothing(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		l := newMembers(t, &sys.Real, "127.0.0.1:0", 2)[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		drained := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
		awaitStop(t, l)
		fd := secretly(t, l)
		require.NoError(t, l.Close())
		require.ErrorIs(t, testkit.Received(t, drained), net.ErrClosed)
		require.False(t, isBound(t, fd))
	})
}

// File returns a file of a socket that works, although Close has begun: it waits for its turn
// to ask the group.
func TestFileDuringClose(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		l := newMembers(t, k, "127.0.0.1:0", 2)[0].Listener
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		held := holding(k, "question")
		closed := make(chan error, 1)
		go func() { closed <- l.Close() }()
		require.Eventually(t, func() bool { return held.Load() > 0 }, testkit.Patience, time.Millisecond)
		f, err := l.File()
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, testkit.Received(t, closed))
		raw, err := f.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) { require.False(t, isBound(t, int(fd))) }))
	})
}

// A child process that has not called execve(2) yet has a copy of each descriptor. It would
// put a close off, and the program for the next close would be wrong.
func TestNoForkDuringClose(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := sys.Real
		hooked, free := 0, 0
		k.SetsockoptInt = func(fd, level, name, value int) error {
			if level == unix.SOL_SOCKET && name == unix.SO_BINDTOIFINDEX {
				hooked++
				if syscall.ForkLock.TryLock() {
					free++
					syscall.ForkLock.Unlock()
				}
			}
			return sys.Real.SetsockoptInt(fd, level, name, value)
		}
		g := newGeneration(t, &k, "tcp4", "127.0.0.1:0", 3)
		newMembers(t, &k, g.shards.Addr().String(), 1)
		g.end(t)
		require.Equal(t, 3, hooked)
		require.Zero(t, free)
	})
}

// Close must not wait for ever, and keep the process from starting others, if code that uses
// the descriptor starts a process, or if a child does not get to execve(2).
func TestCloseAndForkDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		l := newMembers(t, &sys.Real, "127.0.0.1:0", 2)[0].Listener
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		raw, err := l.SyscallConn()
		require.NoError(t, err)
		closed := make(chan error, 1)
		require.NoError(t, raw.Control(func(uintptr) {
			go func() { closed <- l.Close() }()
			require.Eventually(t, func() bool {
				if !syscall.ForkLock.TryLock() {
					return true // Close holds it, and waits for the end of this function
				}
				syscall.ForkLock.Unlock()
				return false
			}, testkit.Patience, 100*time.Microsecond)
			syscall.ForkLock.Lock() // as os/exec does
			defer syscall.ForkLock.Unlock()
		}))
		require.NoError(t, testkit.Received(t, closed))

		l = newMembers(t, &sys.Real, "127.0.0.1:0", 2)[0].Listener
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		syscall.ForkLock.Lock()
		defer syscall.ForkLock.Unlock()
		go func() { closed <- l.Close() }()
		require.NoError(t, testkit.Received(t, closed))
	})
}

// secretly returns a duplicate of the descriptor of l that no drain looks for.
func secretly(t *testing.T, l *Listener) (fd int) {
	t.Helper()
	require.NoError(t, l.intake.Raw.Control(func(own uintptr) {
		var err error
		fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
		require.NoError(t, err)
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// isBound reports whether a socket is bound to an interface.
func isBound(t *testing.T, fd int) bool {
	t.Helper()
	index, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	require.NoError(t, err)
	return index != 0
}

// A counted is a listener of a group that counts its clients.
type counted struct {
	*Listener
	clients atomic.Int64
}

func newMembers(t *testing.T, k *sys.Calls, address string, n int, opts ...Option) (all []*counted) {
	t.Helper()
	for range n {
		ln, err := listenWith(k, t.Context(), "tcp4", address, append([]Option{WithReusePort(), WithBacklog(1024)}, opts...))
		require.NoError(t, err)
		address = ln.Addr().String()
		c := &counted{Listener: ln}
		done := make(chan struct{})
		go func() {
			defer close(done)
			answerEach(ln, func() { c.clients.Add(1) })
		}()
		t.Cleanup(func() { ln.Close(); <-done })
		all = append(all, c)
	}
	return all
}

// shares connects n clients and returns how many each member got.
func shares(t *testing.T, members []*counted, n int) (parts []float64) {
	t.Helper()
	before := make([]int64, len(members))
	for i, m := range members {
		before[i] = m.clients.Load()
	}
	for range n {
		require.NoError(t, ask(members[0].Addr().String()))
	}
	for i, m := range members {
		parts = append(parts, float64(m.clients.Load()-before[i])/float64(n))
	}
	return parts
}

// requireEven requires that each share is about what the hash of the kernel gives.
func requireEven(t *testing.T, parts []float64) {
	t.Helper()
	for _, part := range parts {
		require.InDelta(t, 1/float64(len(parts)), part, 0.6/float64(len(parts)), "%v", parts)
	}
}

// A process was killed and left a BPF program that gives all clients to one listener. The
// next listener removes the program, because all members answer. With WithoutSteering it
// stays.
func TestListenHealsAGroup(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := sys.Real
		for _, row := range []struct {
			name   string
			opts   []Option
			healed bool
		}{{"WithReusePort", nil, true}, {"WithoutSteering", []Option{WithoutSteering()}, false}} {
			t.Run(row.name, func(t *testing.T) {
				members := newMembers(t, &k, "127.0.0.1:0", 2)
				requireEven(t, shares(t, members, 200))
				left := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}
				testkit.OnDescriptor(t, members[0].Listener, func(fd int) (int, error) { return 0, sys.AttachProgram(fd, left) })
				require.Equal(t, []float64{0, 1}, shares(t, members, 50))
				members = append(members, newMembers(t, &k, members[0].Addr().String(), 1, row.opts...)...)
				if row.healed {
					requireEven(t, shares(t, members, 300))
				} else {
					require.Equal(t, []float64{0, 1, 0}, shares(t, members, 50))
				}
			})
		}
	})
}

// While one listener drains, the others share its clients. After its close, or after
// Resume, the hash of the kernel decides again.
func TestSharesAroundADrain(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		for drains := range 4 {
			members := newMembers(t, &k, "127.0.0.1:0", 4)
			others := slices.Delete(slices.Clone(members), drains, drains+1)
			require.NoError(t, members[drains].Drain(testkit.Within(t, testkit.Patience)))
			before := testkit.KernelCounter(t, "TCPSynRetrans")
			requireEven(t, shares(t, others, 200))
			require.NoError(t, members[drains].Resume())
			requireEven(t, shares(t, members, 300))
			require.NoError(t, members[drains].Drain(testkit.Within(t, testkit.Patience)))
			requireEven(t, shares(t, others, 200))
			require.NoError(t, members[drains].Close())
			if drains < 3 { // the last drain leaves a program, which gives the others equal shares
				requireEven(t, shares(t, others, 200))
			}
			newcomers := newMembers(t, &k, members[drains].Addr().String(), 1)
			requireEven(t, shares(t, append(others, newcomers...), 300))
			require.Equal(t, before, testkit.KernelCounter(t, "TCPSynRetrans"), "member %d", drains)
		}
	})
}

// awaitStop waits until a drain of l keeps new clients out: before, clients fall into its
// queue, and nobody accepts them.
func awaitStop(t *testing.T, l *Listener) {
	t.Helper()
	require.Eventually(t, func() bool {
		l.intake.Mu.Lock()
		defer l.intake.Mu.Unlock()
		return l.intake.Stop != nil
	}, testkit.Patience, time.Millisecond)
}

// dialUntil leaves a connection in the queue of l, a member of a group.
func dialUntil(t *testing.T, l *Listener) net.Conn {
	t.Helper()
	for range 1000 {
		c, err := net.DialTimeout("tcp", l.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		if s, err := l.Stats(); err == nil && s.Queued > 0 {
			return c
		}
		c.Close()
	}
	t.Fatal("l got no client")
	return nil
}

// The successor dies while the old listener drains. No listener is left to steer to, so the
// library removes the program, and the next listener gets the clients.
func TestSuccessorDies(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, _ way) {
		members := newMembers(t, &k, "127.0.0.1:0", 2)
		old, successor := members[0], members[1]
		idle(t, old.Listener) // a call of Accept that has passed its deadline check would take the client
		c := dialUntil(t, old.Listener)
		defer c.Close()
		drained := testkit.InBackground(t, old.Listener, testkit.Within(t, 500*time.Millisecond))
		on := func() bool {
			s := old.intake.Steering.Load()
			if s == nil {
				return false
			}
			s.Mu.Lock()
			defer s.Mu.Unlock()
			return s.On
		}
		require.Eventually(t, on, testkit.Patience, time.Millisecond)
		require.NoError(t, successor.Close())
		require.Eventually(t, func() bool { return !on() }, testkit.Patience, time.Millisecond)
		require.ErrorAs(t, testkit.Received(t, drained), new(*DrainError))
		third := newMembers(t, &k, old.Addr().String(), 1)
		require.NoError(t, old.Close())
		require.Equal(t, []float64{1}, shares(t, third, 50))
	})
}

// If no program can be attached, or the group cannot be listed, a drain works as without
// steering.
func TestDrainWithoutAProgram(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, k sys.Calls, v4 way) {
		for name, breaks := range map[string]func(*sys.Calls){
			"EPERM": func(k *sys.Calls) { k.AttachProgram = func(int, []unix.SockFilter) error { return unix.EPERM } },
			"no listing": func(k *sys.Calls) {
				k.Diag = func(request []byte) (sys.DiagAnswer, error) {
					if testkit.StatesOf(request) == 1<<tcpinfo.Listen {
						return sys.DiagAnswer{}, unix.EACCES
					}
					return sys.Diag(request)
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				broken := k
				breaks(&broken)
				members := newMembers(t, &broken, "127.0.0.1:0", 2)
				require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
				require.Equal(t, v4, wayOf(t, members[0].intake.Raw))
				require.NoError(t, members[0].Close())
				require.Equal(t, []float64{1}, shares(t, members[1:], 50))
			})
		}
	})
}

// steeringDrainerEnv is the address of a process that drains and is killed.
const steeringDrainerEnv = "ACCEPTQ_TEST_STEERING_DRAINER"

// drainer is that process.
func drainer(t *testing.T, address string) {
	calls := sys.Real
	l := newMembers(t, &calls, address, 1)[0]
	fmt.Println("listens at", l.Addr())
	bufio.NewReader(os.Stdin).ReadString('\n')
	require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
	fmt.Println("drained")
	select {} // until it is killed
}

// A process is killed after its drain, with the program still on the group: nobody is
// lost or stalled, and the next process that listens has its share of the clients.
func TestSteeringDrainerIsKilled(t *testing.T) {
	if address := os.Getenv(steeringDrainerEnv); address != "" {
		drainer(t, address)
	}
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		for _, row := range []struct {
			name          string
			before, after int // listeners in the order of listen(2)
		}{{"the first of two", 0, 1}, {"the last of two", 1, 0}, {"the first of three", 0, 2}, {"the second of three", 1, 1}, {"the last of three", 2, 0}} {
			t.Run(row.name, func(t *testing.T) {
				var members []*counted
				address := "127.0.0.1:0"
				if row.before > 0 {
					members = newMembers(t, &calls, address, row.before)
					address = members[0].Addr().String()
				}
				self, err := os.Executable()
				require.NoError(t, err)
				cmd := exec.Command(self, "-test.run=^TestSteeringDrainerIsKilled$")
				cmd.Env = append(os.Environ(), steeringDrainerEnv+"="+address)
				in, err := cmd.StdinPipe()
				require.NoError(t, err)
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
				lines := bufio.NewScanner(out)
				require.True(t, lines.Scan())
				address = strings.TrimPrefix(lines.Text(), "listens at ")
				if row.after > 0 {
					members = append(members, newMembers(t, &calls, address, row.after)...)
				}
				clients := newThrong(16, address)
				clients.answers(t, 50)
				before := testkit.KernelCounter(t, "TCPSynRetrans")
				_, err = in.Write([]byte{'\n'})
				require.NoError(t, err)
				require.True(t, lines.Scan())
				require.Equal(t, "drained", lines.Text())
				clients.answers(t, 100)
				require.NoError(t, cmd.Process.Kill())
				cmd.Wait()
				clients.answers(t, 100)
				newcomer := newMembers(t, &calls, address, 1)
				clients.answers(t, 100)
				clients.end(t)
				require.LessOrEqual(t, testkit.KernelCounter(t, "TCPSynRetrans")-before, int64(1))
				requireEven(t, shares(t, append(members, newcomer...), 300))
			})
		}
	})
}

// Two members of a group drain at once, each by a call of its own: no client is lost. The
// others have even shares afterwards.
func TestTwoDrainersAtOnce(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		members := newMembers(t, &calls, "127.0.0.1:0", 4)
		clients := newThrong(16, members[0].Addr().String())
		before := testkit.KernelCounter(t, "TCPSynRetrans")
		const rounds = 4
		for range rounds {
			clients.answers(t, 30)
			var both sync.WaitGroup
			errs := make([]error, 2)
			for i, m := range members[:2] {
				both.Go(func() { errs[i] = errors.Join(m.Drain(testkit.Within(t, testkit.Patience)), m.Close()) })
			}
			both.Wait()
			require.NoError(t, errors.Join(errs...))
			members = append(members[2:], newMembers(t, &calls, members[3].Addr().String(), 2)...)
		}
		answered := clients.end(t)
		t.Logf("%d rounds: %d answered, none lost, %d SYNs sent again", rounds, answered, testkit.KernelCounter(t, "TCPSynRetrans")-before)
		requireEven(t, shares(t, members, 300))
	})
}

// Members come and go while another one drains. In the end the member that drains gets no
// clients.
func TestMembersComeAndGo(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		members := newMembers(t, &calls, "127.0.0.1:0", 3)
		l := members[1].Listener
		address := l.Addr().String()
		others := []*counted{members[0], members[2]}
		// Its loop ends, so the drain waits for what is queued.
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		drained := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
		awaitStop(t, l)
		clients := newThrong(16, address)
		for i := range 5 {
			clients.answers(t, 20)
			others = append(others, newMembers(t, &calls, address, 1)...)
			clients.answers(t, 20)
			gone := others[i%len(others)]
			others = slices.DeleteFunc(others, func(m *counted) bool { return m == gone })
			require.NoError(t, gone.Drain(testkit.Within(t, testkit.Patience)))
			require.NoError(t, gone.Close())
		}
		drops := func() int64 {
			s, err := l.Stats()
			require.NoError(t, err)
			return s.Drops
		}
		require.Eventually(t, func() bool {
			before := drops()
			clients.answers(t, 200)
			return drops() == before
		}, testkit.Patience, time.Millisecond, "it is still given clients")
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() {})
		require.NoError(t, testkit.Received(t, drained))
		require.NoError(t, l.Close())
		t.Logf("%d answered", clients.end(t))
		requireEven(t, shares(t, append(others, newMembers(t, &calls, address, 1)...), 300))
	})
}

// With net.ipv4.tcp_migrate_req the kernel gives what a closing listener has to the
// other members of its group. With a program besides, a Close without Drain loses
// nobody. Neither of the two alone does that.
func TestMigrateAndSteer(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		calls := sys.Real
		for _, row := range []struct {
			name    string
			migrate int
			loses   bool
		}{{"the program alone", 0, true}, {"both", 1, false}} {
			t.Run(row.name, func(t *testing.T) {
				testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", row.migrate)
				system, err := ReadSystem()
				require.NoError(t, err)
				require.Equal(t, row.migrate, system.MigrateRequests)
				current := newMembers(t, &calls, "127.0.0.1:0", 1)[0]
				var answered, lost atomic.Int64
				stop := make(chan struct{})
				var clients sync.WaitGroup
				for range 32 {
					clients.Go(func() {
						for {
							select {
							case <-stop:
								return
							default:
							}
							if ask(current.Addr().String()) != nil {
								lost.Add(1)
							} else {
								answered.Add(1)
							}
						}
					})
				}
				const restarts = 20
				address := current.Addr().String()
				last := current
				for range restarts {
					want := answered.Load() + 50
					require.Eventually(t, func() bool { return answered.Load() >= want }, testkit.Patience, time.Millisecond)
					next := newMembers(t, &calls, address, 1)[0]
					testkit.OnDescriptor(t, last.Listener, func(fd int) (int, error) { return 0, sys.AttachProgram(fd, intake.Program(2, []int{0})) })
					require.NoError(t, last.Close())
					last = next
				}
				close(stop)
				clients.Wait()
				t.Logf("%d restarts: %d answered, %d lost", restarts, answered.Load(), lost.Load())
				require.Equal(t, row.loses, lost.Load() > 0)
			})
		}
	})
}

// A drain runs out of time with a connection in its queue. With net.ipv4.tcp_migrate_req
// the other member of the group serves it after Close; without it Close resets it.
func TestMigrateAfterADrainThatRanOut(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		for migrate, want := range []error{unix.ECONNRESET, nil} {
			testkit.SetSysctl(t, "net.ipv4.tcp_migrate_req", migrate)
			members := newMembers(t, &calls, "127.0.0.1:0", 2)
			old := members[0]
			require.NoError(t, old.SetDeadline(time.Now())) // its loop ends
			require.Eventually(t, func() bool {
				old.intake.Gate.Mu.Lock()
				defer old.intake.Gate.Mu.Unlock()
				return old.intake.Gate.Inside == 0
			}, testkit.Patience, time.Millisecond)
			c := dialUntil(t, old.Listener)
			defer c.Close()
			var left *DrainError
			require.ErrorAs(t, old.Drain(testkit.Within(t, 50*time.Millisecond)), &left)
			require.Equal(t, 1, left.Queued)
			require.NoError(t, old.Close())
			require.NoError(t, c.SetDeadline(time.Now().Add(testkit.Patience)))
			_, err := c.Read(make([]byte, 1))
			if want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, want)
			}
		}
	})
}

// A handshake by a SYN cookie has no state, so its last ACK goes to a listener that is
// chosen then: with steering to one that does not drain.
func TestSteeringLeadsCookies(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2)
		calls := sys.Real
		for _, row := range []struct {
			name string
			opts []Option
		}{{"steered", nil}, {"not steered", []Option{WithoutSteering()}}} {
			t.Run(row.name, func(t *testing.T) {
				members := newMembers(t, &calls, "127.0.0.1:0", 2, row.opts...)
				old, successor := members[0], members[1]
				d := net.Dialer{Timeout: testkit.Patience, Control: testkit.LateACK}
				var conns []net.Conn
				for range 40 {
					c, err := d.Dial("tcp", old.Addr().String())
					require.NoError(t, err)
					defer c.Close()
					conns = append(conns, c)
				}
				drained := testkit.InBackground(t, old.Listener, testkit.Within(t, testkit.Patience))
				awaitStop(t, old.Listener)
				before, beside := old.clients.Load(), successor.clients.Load()
				for _, c := range conns {
					require.NoError(t, c.SetDeadline(time.Now().Add(testkit.Patience)))
					_, err := c.Write([]byte{'?'})
					require.NoError(t, err)
					_, err = c.Read(make([]byte, 1))
					require.NoError(t, err)
				}
				late := successor.clients.Load() - beside
				t.Logf("%d answered: while one drains, %d by the other and %d by it", len(conns), late, old.clients.Load()-before)
				require.Positive(t, late)
				if row.opts == nil {
					require.Equal(t, before, old.clients.Load())
				} else {
					require.Greater(t, old.clients.Load(), before)
				}
				require.NoError(t, testkit.Received(t, drained))
			})
		}
	})
}

// Each kernel call that steering adds fails, from the first time on or later: a restart
// loses nobody all the same, and stalls no more clients than one without steering, which
// may stall each client once.
func TestRestartsUnderFaults(t *testing.T) {
	t.Parallel()
	forEachStop(t, func(t *testing.T, calls sys.Calls, _ way) {
		fails := func(after int, err error) func() error {
			var calls atomic.Int64
			return func() error {
				if calls.Add(1) > int64(after) {
					return err
				}
				return nil
			}
		}
		faults := map[string]func(calls *sys.Calls, fail func() error){
			"attach": func(calls *sys.Calls, fail func() error) {
				attach := calls.AttachProgram
				calls.AttachProgram = func(fd int, p []unix.SockFilter) error {
					if err := fail(); err != nil {
						return err
					}
					return attach(fd, p)
				}
			},
			"detach": func(calls *sys.Calls, fail func() error) {
				detach := calls.DetachProgram
				calls.DetachProgram = func(fd int) error {
					if err := fail(); err != nil {
						return err
					}
					return detach(fd)
				}
			},
			"list": func(calls *sys.Calls, fail func() error) {
				calls.Diag = func(request []byte) (sys.DiagAnswer, error) {
					if testkit.StatesOf(request) == 1<<tcpinfo.Listen {
						if err := fail(); err != nil {
							return sys.DiagAnswer{}, err
						}
					}
					return sys.Diag(request)
				}
			},
			"a row too short": func(calls *sys.Calls, fail func() error) {
				calls.Diag = func(request []byte) (sys.DiagAnswer, error) {
					if testkit.StatesOf(request) == 1<<tcpinfo.Listen && fail() != nil {
						return testkit.Listing(make([]byte, sockdiag.DiagMsgSize-1))(request)
					}
					return sys.Diag(request)
				}
			},
		}
		const restarts, clients = 3, 8
		before := testkit.KernelCounter(t, "TCPSynRetrans")
		runs := 0
		t.Run("fault", func(t *testing.T) {
			for name, breaks := range faults {
				for _, errno := range []unix.Errno{unix.EPERM, unix.EINVAL, unix.ENOMEM}[:min(rounds(5), 3)] {
					if name == "a row too short" && errno != unix.EPERM {
						continue
					}
					for _, after := range []int{0, 1, 4} {
						runs++
						t.Run(fmt.Sprintf("%s, %v after %d", name, errno, after), func(t *testing.T) {
							t.Parallel()
							broken := calls
							breaks(&broken, fails(after, errno))
							current := newMembers(t, &broken, "127.0.0.1:0", 1)[0]
							address := current.Addr().String()
							throng := newThrong(clients, address)
							for range restarts {
								throng.answers(t, 20)
								next := newMembers(t, &broken, address, 1)[0]
								require.NoError(t, current.Drain(testkit.Within(t, testkit.Patience)))
								require.NoError(t, current.Close())
								current = next
							}
							throng.end(t)
							require.Equal(t, []float64{1}, shares(t, []*counted{current}, 20))
						})
					}
				}
			}
		})
		again := testkit.KernelCounter(t, "TCPSynRetrans") - before
		t.Logf("%d runs of %d restarts, %d clients: %d SYNs sent again", runs, restarts, clients, again)
		require.LessOrEqual(t, again, int64(runs*restarts*clients))
	})
}

// Rolling restarts, with the replicas in processes of their own: a new replica listens,
// then an old one drains and closes, while clients connect all the time. These tests use
// exported functions only.
//
// By default they run a few rows. With ACCEPTQ_ROUNDS=2 or more they run all rows, with
// so many times the stops.

// A stopping is an order in which the members of a group stop.
type stopping struct {
	name    string
	least   int // the least number of replicas for which it differs from the others
	pick    func(members []*replica) []*replica
	replace bool // as many new replicas listen before
}

var stoppings = []stopping{
	{"oldest", 1, func(m []*replica) []*replica { return m[:1] }, true},
	{"newest", 2, func(m []*replica) []*replica { return m[len(m)-1:] }, true},
	{"random", 2, func(m []*replica) []*replica { return pickRandom(m, 1) }, true},
	{"two", 3, func(m []*replica) []*replica { return pickRandom(m, 2) }, true},
	{"all", 2, func(m []*replica) []*replica { return m }, true},
	{"allButOne", 2, func(m []*replica) []*replica { return pickRandom(m, len(m)-1) }, false},
}

func pickRandom(members []*replica, n int) (some []*replica) {
	for _, i := range rand.Perm(len(members))[:n] {
		some = append(some, members[i])
	}
	return some
}

// rollingAddresses are the addresses of the replicas, and where their clients connect.
var rollingAddresses = map[string]struct {
	network, address string
	hosts            []string
}{
	"IPv4": {"tcp4", "127.0.0.1:0", []string{"127.0.0.1"}},
	"IPv6": {"tcp6", "[::1]:0", []string{"::1"}},
	"dual": {"tcp", ":0", []string{"127.0.0.1", "::1"}},
}

// needs skips a test that this system cannot run.
func needs(t *testing.T, family string, spec replicaSpec) {
	t.Helper()
	if os.Getenv(testkit.NamespaceEnv) != "" {
		return
	}
	if family != "IPv4" {
		haveIPv6(t)
	}
	if spec.UID != 0 && os.Geteuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
}

// newFleet starts replicas.
func newFleet(t *testing.T, family string, replicas int, spec replicaSpec) *fleet {
	t.Helper()
	at := rollingAddresses[family]
	spec.Network, spec.Address = at.network, at.address
	spec.Shards = max(spec.Shards, 1)
	f := &fleet{spec: spec, hosts: at.hosts}
	f.add(t, replicas)
	return f
}

// rollingSlots limits how many of these tests run at a time: more would delay each other.
var rollingSlots = make(chan struct{}, 3)

// inSlot runs f in a namespace of its own.
func inSlot(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	rollingSlots <- struct{}{}
	defer func() { <-rollingSlots }()
	testkit.InNamespace(t, f)
}

// A rolling is one row.
type rolling struct {
	replicas int
	stopping string
	family   string
	spec     replicaSpec
	stops    int
}

func (r rolling) name() string {
	return fmt.Sprintf("%d_%s_%s_%s", r.replicas, r.stopping, r.family, r.spec.name())
}

func (r rolling) run(t *testing.T) *fleet {
	f := newFleet(t, r.family, r.replicas, r.spec)
	f.start(t, f.members)
	order := stoppings[slices.IndexFunc(stoppings, func(s stopping) bool { return s.name == r.stopping })]
	for i := range r.stops {
		victims := slices.Clone(order.pick(f.members))
		if order.replace {
			f.add(t, len(victims))
			f.settle(t, time.Now())
			f.even(t, fmt.Sprintf("before stop %d", i), f.members)
		}
		f.stop(t, victims...)
		f.even(t, fmt.Sprintf("after stop %d", i), f.members)
		if !order.replace && i < r.stops-1 {
			f.add(t, len(victims))
		}
	}
	return f
}

// rollings returns the rows. nobody is user 65534.
func rollings(factor int) (rows []rolling) {
	const nobody = 65534
	if factor <= 1 {
		return []rolling{
			{1, "oldest", "IPv4", replicaSpec{}, 2},
			{1, "oldest", "dual", replicaSpec{TTL: true, UID: nobody}, 2},
			{2, "oldest", "IPv4", replicaSpec{TTL: true, UID: nobody}, 2},
			{3, "oldest", "IPv6", replicaSpec{}, 2},
			{3, "two", "IPv4", replicaSpec{}, 2},
			{5, "all", "dual", replicaSpec{TTL: true, UID: nobody}, 1},
			{5, "allButOne", "IPv4", replicaSpec{}, 1},
			{8, "two", "IPv4", replicaSpec{}, 1},
		}
	}
	for _, replicas := range []int{1, 2, 3, 5, 8} {
		for _, s := range stoppings {
			if replicas < s.least {
				continue
			}
			for _, family := range []string{"IPv4", "IPv6", "dual"} {
				for _, ttl := range []bool{false, true} {
					for _, uid := range []int{0, nobody} {
						rows = append(rows, rolling{replicas, s.name, family, replicaSpec{TTL: ttl, UID: uid}, 2 * factor})
					}
				}
			}
		}
	}
	return rows
}

func TestRollingRestarts(t *testing.T) {
	if os.Getenv(replicaEnv) != "" {
		serveReplica(t)
		return
	}
	t.Parallel()
	for _, row := range rollings(rollingRounds(t)) {
		t.Run(row.name(), func(t *testing.T) {
			needs(t, row.family, row.spec)
			inSlot(t, func(t *testing.T) { row.run(t).finishExactly(t) })
		})
	}
}

// Without steering clients stall. So the clients of these tests notice it.
func TestRollingControl(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		f := rolling{2, "oldest", "IPv4", replicaSpec{Unsteered: true}, 4}.run(t)
		f.halt()
		t.Logf("stalled at each stop: %v", f.stalled)
		require.Positive(t, f.stalls)
		require.Empty(t, f.losses)
	})
}

// A replica is killed. A client that it has accepted is lost. Each other client is served,
// without a stall, and a new replica gets its share.
func TestRollingKill(t *testing.T) {
	t.Parallel()
	ask := func(commands ...string) func(t *testing.T, v *replica) {
		return func(t *testing.T, v *replica) {
			for _, command := range commands {
				v.say(t, command)
				v.hear(t, command)
			}
		}
	}
	factor := rollingRounds(t)
	for _, row := range []struct {
		when    string
		prepare func(t *testing.T, v *replica)
		loses   bool
	}{
		{"before", ask(), true},
		{"atDrain", func(t *testing.T, v *replica) {
			v.say(t, "drain")
			<-time.After(rand.N(3 * time.Millisecond)) // so any step of the drain may be the last
		}, true},
		{"during", ask("hang"), true}, // a connection waits for Accept, so the drain goes on
		{"after", ask("drain"), false},
		{"atClose", func(t *testing.T, v *replica) { ask("drain")(t, v); v.say(t, "close") }, false},
	} {
		for _, spec := range []replicaSpec{{}, {TTL: true, UID: 65534}} {
			if factor == 1 && spec.TTL != (row.when == "during") {
				continue
			}
			t.Run(fmt.Sprintf("%s_%s", row.when, spec.name()), func(t *testing.T) {
				needs(t, "IPv4", spec)
				inSlot(t, func(t *testing.T) {
					f := newFleet(t, "IPv4", 3, spec)
					f.start(t, f.members)
					for range factor {
						f.add(t, 1)
						f.stop(t, f.members[0]) // the members are now in another order
						v := pickRandom(f.members, 1)[0]
						before := f.slow()
						row.prepare(t, v)
						switch row.when {
						case "during":
							f.more(t, 200)
						case "after":
							f.settle(t, time.Now())
							f.even(t, "after the drain", others(f.members, v))
						}
						f.kill(t, v, row.loses)
						f.stalled[len(f.stalled)-1] = f.slow() - before
						f.add(t, 1)
						f.settle(t, time.Now())
						f.even(t, "with a new replica", f.members)
					}
					if row.loses {
						f.finish(t)
					} else {
						f.finishExactly(t)
					}
				})
			})
		}
	}
}

func others(members []*replica, but *replica) []*replica {
	return slices.DeleteFunc(slices.Clone(members), func(m *replica) bool { return m == but })
}

// Replicas restart beside one whose drain goes on, because a connection waits for Accept.
func TestRollingBesideADrain(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		f := newFleet(t, "IPv4", 3, replicaSpec{})
		drains := pickRandom(f.members, 1)[0]
		drains.say(t, "hang")
		hangs := make(chan struct{})
		var connects sync.WaitGroup
		connects.Go(func() {
			for range 5000 { // until one of these waits for Accept there
				select {
				case <-hangs:
					return
				default:
				}
				c, err := net.DialTimeout("tcp", f.spec.Address, testkit.Patience)
				if err != nil {
					continue
				}
				c.Write([]byte{'?'})
				go func() { // the other members answer
					c.Read(make([]byte, 1))
					c.Close()
				}()
			}
		})
		drains.hear(t, "hang")
		close(hangs)
		connects.Wait()
		f.start(t, others(f.members, drains))
		for range 2 * rollingRounds(t) {
			f.add(t, 1)
			f.settle(t, time.Now())
			f.evenSoon(t, "before the stop", others(f.members, drains))
			f.stop(t, others(f.members, drains)[0])
			f.evenSoon(t, "after the stop", others(f.members, drains))
		}
		f.kill(t, drains, false)
		f.finish(t)
	})
}

// A replica with 64 shards and three with one listener restart, one after the other.
func TestRollingShards(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		f := newFleet(t, "IPv4", 1, replicaSpec{Shards: 64})
		f.spec.Shards = 1
		f.add(t, 3)
		f.start(t, f.members)
		factor := rollingRounds(t)
		for range factor {
			for i, old := range slices.Clone(f.members) {
				if factor == 1 && i > 1 {
					continue
				}
				f.spec.Shards = old.Shards
				f.add(t, 1)
				f.settle(t, time.Now())
				f.even(t, "before the stop", f.members)
				f.stop(t, old)
				f.even(t, "after the stop", f.members)
			}
		}
		f.finishExactly(t)
	})
}

// What a drain and a Resume do to a listener and to its group is gone afterwards: its
// socket options, those of its connections, and half-open handshakes at the others.
func TestRollingLeavesNoTrace(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		family string
		spec   replicaSpec
	}{
		{"IPv4", replicaSpec{}},
		{"IPv4", replicaSpec{TTL: true, UserTTL: 77}},
		{"IPv6", replicaSpec{UserTTL: 77}},
		{"dual", replicaSpec{TTL: true}},
		{"dual", replicaSpec{UserTTL: intake.MaxTTL}},
	} {
		t.Run(fmt.Sprintf("%s_%s_ttl%d", row.family, row.spec.name(), row.spec.UserTTL), func(t *testing.T) {
			needs(t, row.family, row.spec)
			inSlot(t, func(t *testing.T) { drainAndResume(t, row.family, row.spec) })
		})
	}
}

func drainAndResume(t *testing.T, family string, spec replicaSpec) {
	at := rollingAddresses[family]
	spec.Network, spec.Address, spec.Shards = at.network, at.address, 1
	var members []*server
	for i := range 3 {
		spec.ID = byte(i)
		m := newServer(t, spec)
		spec.Address = m.shards.Addr().String()
		members = append(members, m)
	}
	addr := members[0].shards.Addr()
	clients := newBusy(t, at.hosts, addr.String())
	clients.settle(t, time.Now())
	clients.calibrate()
	for range rollingRounds(t) {
		for _, m := range members {
			l := m.shards.listeners[0]
			before := optionsOf(t, l)
			m.drain(t)
			clients.settled(time.Now(), 2*stallTime) // a client that stalls here is counted
			require.NoError(t, l.Resume())
			require.Equal(t, before, optionsOf(t, l))
			clients.settle(t, time.Now())
		}
	}
	clients.halt()
	requireNoneHalfOpen(t, addr)
	accepted := 0
	for _, m := range members {
		m.close(t)
		m.answered(t)
		accepted += int(m.accepted.Load())
		require.Zero(t, m.odd.Load(), "connections with other TTL settings than those of the user")
	}
	t.Logf("%d answered, %d stalled", clients.answered, clients.stalls)
	require.Empty(t, clients.losses)
	require.Zero(t, clients.stalls)
	require.Equal(t, clients.answered, accepted, "accepted connections that are not of the clients")
}

// The clients with which a drain asks the group delay no other drain: it does not wait
// until the members send SYN-ACKs to them again, which is after a second.
func TestRollingDrainsDoNotDelay(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		slowest := func(opts ...Option) (most time.Duration) {
			address := "127.0.0.1:0"
			var members []*Listener
			for range 4 {
				l, err := Listen(t.Context(), "tcp4", address, append(opts, WithReusePort())...)
				require.NoError(t, err)
				t.Cleanup(func() { l.Close() })
				address = l.Addr().String()
				go answerEach(l, func() {})
				members = append(members, l)
			}
			for _, l := range members[1:] {
				began := time.Now()
				require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
				most = max(most, time.Since(began))
			}
			return most
		}
		control, asking := slowest(WithoutSteering()), slowest()
		t.Logf("the slowest of 3 drains: %v, and %v without steering", asking, control)
		require.Less(t, asking, control+stallTime)
	})
}

// 64 listeners of a group drain, each by a call of its own, while a connection waits in
// each queue. Steering must not cost much more processor time than the rest of these drains.
func TestRollingProcessorTime(t *testing.T) {
	if rollingRounds(t) == 1 {
		t.Skip("set ACCEPTQ_ROUNDS=2: this takes 15 seconds")
	}
	inSlot(t, func(t *testing.T) {
		const (
			listeners = 64
			lasts     = 2 * time.Second
		)
		used := func(opts ...Option) (cores float64) {
			s, err := ListenTCPShards("127.0.0.1:0", listeners+1, append(opts, WithReusePort())...)
			require.NoError(t, err)
			defer s.Close()
			for l := range s.All() {
				c := dialUntil(t, l)
				defer c.Close()
			}
			before := processorTime(t)
			var drains sync.WaitGroup
			for _, l := range slices.Collect(s.All())[:listeners] {
				drains.Go(func() { l.Drain(testkit.Within(t, lasts)) })
			}
			drains.Wait()
			return float64(processorTime(t)-before) / float64(lasts)
		}
		var steered, plain []float64
		for range 3 {
			plain = append(plain, used(WithoutSteering()))
			steered = append(steered, used())
		}
		slices.Sort(steered)
		slices.Sort(plain)
		t.Logf("%d drains use %.3f of a core; without steering %.3f", listeners, steered, plain)
		require.Less(t, steered[1], 1.5*plain[1])
	})
}

// processorTime returns the processor time that this process has used.
func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	require.NoError(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A program that sets SO_REUSEPORT with WithControl, as it did with net.ListenConfig, gets
// the same drain as with WithReusePort: new clients go to the next listener at once.
func TestReusePortByControl(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		for _, row := range []struct {
			name string
			opts []Option
			most int64 // the maximum of SYNs that are sent again
		}{
			{"WithReusePort", []Option{WithReusePort()}, 3},
			{"WithControl", []Option{withInt(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)}, 3},
		} {
			t.Run(row.name, func(t *testing.T) {
				serve := func(address string) *Listener {
					ln, err := ListenTCP(address, row.opts...)
					require.NoError(t, err)
					go answerEach(ln, func() {})
					return ln
				}
				old := serve("127.0.0.1:0")
				address := old.Addr().String()
				clients := newThrong(8, address)
				clients.answers(t, 50)
				before := testkit.KernelCounter(t, "TCPSynRetrans")
				for range 10 {
					next := serve(address)
					require.NoError(t, old.Drain(testkit.Within(t, testkit.Patience)))
					require.NoError(t, old.Close())
					old = next
					clients.answers(t, 20)
				}
				answered := clients.end(t)
				again := testkit.KernelCounter(t, "TCPSynRetrans") - before
				t.Logf("10 restarts: %d answered, %d SYNs sent again", answered, again)
				require.LessOrEqual(t, again, row.most)
				require.NoError(t, old.Close())
			})
		}
	})
}

// anotherProcess returns k as another process has it: with a memory of its own.
func anotherProcess(k sys.Calls) *sys.Calls {
	k.Memory = new(sync.Map)
	return &k
}

// holding makes k find the names of turns in use by another process.
func holding(k *sys.Calls, what string) (names *atomic.Int64) {
	names = new(atomic.Int64)
	k.Reserve = func(fd int, name string) error {
		if strings.HasPrefix(name, "@acceptq/"+what+"/") {
			names.Add(1)
			return unix.EADDRINUSE
		}
		return sys.Real.Reserve(fd, name)
	}
	return names
}

// A process that never ends its turn, because it is stopped or hostile, must not keep the
// drains of others from ending, even if they have no deadline.
func TestDrainBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 1)
		l := members[0].Listener
		idle(t, l)
		c := dialUntil(t, l)
		defer c.Close()
		held := holding(k, "question")
		drained := testkit.InBackground(t, l, t.Context())
		awaitStop(t, l)
		newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1) // so the drain asks again
		before := held.Load()
		require.Eventually(t, func() bool { return held.Load() > before }, testkit.Patience, time.Millisecond)
		require.NoError(t, l.SetDeadline(time.Time{}))
		go answerEach(l, func() {})
		require.NoError(t, testkit.Received(t, drained))
	})
}

// Listeners that close beside a process that never ends its turn wait for it once, and not
// once for each listener.
func TestCloseBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		shards, err := listenShards(k, t.Context(), "tcp4", "127.0.0.1:0", 16, []Option{WithReusePort()})
		require.NoError(t, err)
		newMembers(t, anotherProcess(sys.Real), shards.Addr().String(), 1)
		held := holding(k, "question")
		var waits []int64
		require.NoError(t, shards.Drain(testkit.Within(t, testkit.Patience)))
		for l := range shards.All() {
			before := held.Load()
			require.NoError(t, l.Close())
			if n := held.Load() - before; n > 100 {
				waits = append(waits, n)
			}
		}
		require.LessOrEqual(t, len(waits), 1, "how often each Close that waited has asked for a turn: %v", waits)
	})
}

// The group cannot be asked when a listener closes, because there is no descriptor left. The
// program that it leaves must not exclude a member that has joined since the drain.
func TestCloseWithoutDescriptors(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		members := newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1)
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		members = append(members, newMembers(t, anotherProcess(sys.Real), l.Addr().String(), 1)...)
		k.UnixSocket = func() (int, error) { return -1, unix.EMFILE }
		k.ClientSocket = func(unix.Sockaddr, int, bool) (int, uint16, error) { return -1, 0, unix.EMFILE }
		require.NoError(t, l.Close())
		requireEven(t, shares(t, members, 200))
	})
}

// A listener that has joined while another one was drained has excluded it from new clients.
// Resume must include it again, although its own drain has attached no program.
func TestResumeAfterAnotherHasJoined(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		members = append(members, newMembers(t, anotherProcess(sys.Real), members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 200))
	})
}

// Resume and Close at the same time.
func TestResumeDuringClose(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		l := newMembers(t, k, "127.0.0.1:0", 1)[0]
		address := l.Addr().String()
		silent := newMembers(t, anotherProcess(sys.Real), address, 1)[0]
		newMembers(t, anotherProcess(sys.Real), address, 1)
		silent.intake.Steers = false
		require.NoError(t, silent.Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		var once sync.Once
		k.Disconnect = func(fd int, at unix.Sockaddr) error {
			once.Do(func() { l.Resume() })
			return sys.Real.Disconnect(fd, at)
		}
		require.NoError(t, l.Close())
		requireNoTurn(t)
	})
}

// A listener is closed at the moment at which its drain joins the steering of its group. The
// steering must forget it. Otherwise the process would hold the turn of its drain for ever.
func TestCloseWhileTheDrainJoins(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		var once sync.Once
		k.Diag = func(request []byte) (sys.DiagAnswer, error) {
			answer, err := sys.Real.Diag(request)
			if binary.NativeEndian.Uint32(request[unix.SizeofNlMsghdr+4:]) == 1<<tcpinfo.Listen {
				once.Do(func() { l.Close() })
			}
			return answer, err
		}
		require.ErrorIs(t, l.Drain(testkit.Within(t, testkit.Patience)), net.ErrClosed)
		requireNoTurn(t)
		require.NoError(t, members[1].Drain(testkit.Within(t, testkit.Patience)))
	})
}

// Resume ends a drain that still waits for the drains of other processes.
func TestResumeWhileADrainBegins(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		members := newMembers(t, k, "127.0.0.1:0", 2)
		l := members[0].Listener
		held := holding(k, "drain")
		drained := testkit.InBackground(t, l, testkit.Within(t, testkit.Patience))
		require.Eventually(t, func() bool { return held.Load() > 0 }, testkit.Patience, time.Millisecond)
		require.NoError(t, l.Resume())
		require.ErrorIs(t, testkit.Received(t, drained), ErrStillOpen)
		require.Nil(t, l.intake.Steering.Load())
		requireNoTurn(t)
		requireEven(t, shares(t, members, 200))
	})
}

// If Resume cannot let new clients in, they must not be directed to the listener.
func TestFailedResumeKeepsSteering(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		k := anotherProcess(sys.Real)
		var fails atomic.Bool
		set := k.SetsockoptInt
		k.SetsockoptInt = func(fd, level, name, value int) error {
			if fails.Load() && name == unix.SO_DETACH_FILTER {
				return unix.EPERM
			}
			return set(fd, level, name, value)
		}
		members := newMembers(t, k, "127.0.0.1:0", 2)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		fails.Store(true)
		require.ErrorIs(t, members[0].Resume(), unix.EPERM)
		require.Equal(t, []float64{0, 1}, shares(t, members, 40))
		fails.Store(false)
		require.NoError(t, members[0].Resume())
		requireEven(t, shares(t, members, 200))
	})
}

// A member that sends with a TTL of 255, unlike the listener that asks, must get no connection
// from a question.
func TestQuestionToAMemberWithAnotherTTL(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		other := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1, withInt(unix.IPPROTO_IP, unix.IP_TTL, intake.MaxTTL))[0]
		l := newMembers(t, anotherProcess(sys.Real), other.Addr().String(), 1)[0]
		require.NoError(t, l.Drain(testkit.Within(t, testkit.Patience)))
		require.NoError(t, l.Close())
		require.NoError(t, ask(other.Addr().String())) // the connections before it were accepted too
		require.EqualValues(t, 1, other.clients.Load())
	})
}

// Members with a minimum TTL of their own (GTSM, RFC 5082) do not answer the question of a
// listener that joins. If it is such a member itself, it must not direct all clients to the
// others.
func TestJoinWithAMinimumTTL(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		testkit.SetSysctl(t, "net.ipv4.ip_default_ttl", intake.MaxTTL)
		members = append(members, newMembers(t, anotherProcess(sys.Real), members[0].Addr().String(), 1,
			withInt(unix.IPPROTO_IP, unix.IP_MINTTL, intake.MaxTTL))...)
		requireEven(t, shares(t, members, 200))
	})
}

// A listener that joins beside a process that never ends its turn still asks the group.
func TestJoinBesideAnEndlessTurn(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		members := newMembers(t, anotherProcess(sys.Real), "127.0.0.1:0", 1)
		require.NoError(t, members[0].Drain(testkit.Within(t, testkit.Patience)))
		k := anotherProcess(sys.Real)
		holding(k, "question")
		members = append(members, newMembers(t, k, members[0].Addr().String(), 1)...)
		require.Equal(t, []float64{0, 1}, shares(t, members, 20))
	})
}

// requireNoTurn requires that no process in this namespace has the turn to drain.
func requireNoTurn(t *testing.T) {
	t.Helper()
	names, err := os.ReadFile("/proc/thread-self/net/unix")
	require.NoError(t, err)
	require.NotContains(t, string(names), "@@acceptq/drain/")
	require.NotContains(t, string(names), "@acceptq/drain/")
}
