package acceptq

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

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
	if os.Getenv(namespaceEnv) != "" {
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
	inNamespace(t, f)
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
				c, err := net.DialTimeout("tcp", f.spec.Address, patience)
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
			f.even(t, "before the stop", others(f.members, drains))
			f.stop(t, others(f.members, drains)[0])
			f.more(t, 300) // the drain that goes on notices the change
			f.even(t, "after the stop", others(f.members, drains))
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
		{"dual", replicaSpec{UserTTL: maxTTL}},
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
				require.NoError(t, l.Drain(within(t, patience)))
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
				drains.Go(func() { l.Drain(within(t, lasts)) })
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
