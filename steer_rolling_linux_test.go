package acceptq

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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

// newFleet starts replicas and their clients, and measures the control.
func newFleet(t *testing.T, family string, replicas int, spec replicaSpec) *fleet {
	t.Helper()
	if family != "IPv4" {
		haveIPv6(t)
	}
	at := rollingAddresses[family]
	spec.Network, spec.Address = at.network, at.address
	spec.Shards = max(spec.Shards, 1)
	f := &fleet{spec: spec, hosts: at.hosts}
	f.add(t, replicas)
	f.control(t)
	return f
}

// rollingSlots limits how many of these tests run at a time: more would delay each other.
var rollingSlots = make(chan struct{}, 2)

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
	way, user := "filter", "root"
	if r.spec.TTL {
		way = "ttl"
	}
	if r.spec.UID != 0 {
		user = "nobody"
	}
	return fmt.Sprintf("%d_%s_%s_%s_%s", r.replicas, r.stopping, r.family, way, user)
}

func (r rolling) run(t *testing.T) *fleet {
	f := newFleet(t, r.family, r.replicas, r.spec)
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
		if !order.replace {
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
			{1, "oldest", "IPv4", replicaSpec{}, 3},
			{1, "oldest", "dual", replicaSpec{TTL: true, UID: nobody}, 2},
			{2, "oldest", "IPv4", replicaSpec{TTL: true, UID: nobody}, 2},
			{3, "oldest", "IPv6", replicaSpec{}, 3},
			{3, "two", "IPv4", replicaSpec{}, 2},
			{5, "random", "dual", replicaSpec{TTL: true, UID: nobody}, 2},
			{5, "allButOne", "IPv4", replicaSpec{}, 1},
			{8, "newest", "IPv4", replicaSpec{}, 2},
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
			inSlot(t, func(t *testing.T) { row.run(t).finishExactly(t) })
		})
	}
}

// Without steering clients stall. So the clients of these tests notice it.
func TestRollingControl(t *testing.T) {
	inSlot(t, func(t *testing.T) {
		f := rolling{2, "oldest", "IPv4", replicaSpec{Unsteered: true}, 1}.run(t)
		f.halt()
		t.Logf("stalled at each stop: %v", f.stalled)
		require.Positive(t, f.stalls)
		require.Empty(t, f.losses)
	})
}
