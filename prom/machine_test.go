package acceptqprom

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

// A fakeMachine is what the kernel and /proc tell.
type fakeMachine struct {
	*MachineCollector
	sockets []acceptq.Queue
	holders map[uint64][]observe.Process
	err     error
	walks   int // readings of /proc
	now     time.Time
}

func newFakeMachine(opts ...MachineOption) *fakeMachine {
	m := &fakeMachine{holders: make(map[uint64][]observe.Process), now: time.Now()}
	m.MachineCollector = newMachineCollector(
		func(context.Context) ([]acceptq.Queue, error) { return m.sockets, m.err },
		func(context.Context, ...uint64) (map[uint64][]observe.Process, bool, error) {
			m.walks++
			return m.holders, true, m.err
		}, opts)
	return m
}

// scrape returns the accounts by their label listener, after some time.
func (m *fakeMachine) scrape(t *testing.T, after time.Duration) map[string]account {
	t.Helper()
	m.now = m.now.Add(after)
	accounts, err := m.read(m.now)
	require.NoError(t, err)
	all := make(map[string]account)
	for _, a := range accounts {
		for _, l := range a.labels {
			if l.GetName() == "listener" {
				all[l.GetValue()] = a
			}
		}
	}
	require.Len(t, all, len(accounts))
	return all
}

func (m *fakeMachine) drops(t *testing.T, listener string) int64 {
	t.Helper()
	all := m.scrape(t, 15*time.Second)
	require.Contains(t, all, listener)
	return all[listener].Drops
}

// queue is a socket of which 2 of 8 places are in use.
func queue(addr string, inode uint64, drops int64) acceptq.Queue {
	return acceptq.Queue{
		Addr: netip.MustParseAddrPort(addr), Inode: inode,
		Stats: acceptq.Stats{Queued: 2, Incomplete: unknown, Limit: 7, Capacity: 8, Drops: drops},
	}
}

// The counter of drops begins with what the kernel has counted. It rises with each socket of
// the listener, and it does not fall or jump when sockets come, go or change their name.
func TestMachineDrops(t *testing.T) {
	const group = "10.0.0.1:80"
	m := newFakeMachine()
	sockets := func(all ...acceptq.Queue) { m.sockets = all }
	sockets(queue(group, 1, 100), queue(group, 2, math.MaxUint32-1))
	require.Equal(t, int64(100+math.MaxUint32-1), m.drops(t, group))
	total := m.drops(t, group)
	sockets(queue(group, 1, 101), queue(group, 2, 3))
	require.Equal(t, total+1+5, m.drops(t, group), "the kernel's counter has wrapped")

	total = m.drops(t, group)
	sockets(queue(group, 1, 101))
	require.Equal(t, total, m.drops(t, group), "a member has gone")
	sockets(queue(group, 1, 102), queue(group, 3, 7))
	require.Equal(t, total+1+7, m.drops(t, group), "a new member has dropped 7")
	sockets(queue(group, 4, 2))
	require.Equal(t, total+8+2, m.drops(t, group), "the server has been restarted")
	sockets(queue(group, 4, 1))
	require.Equal(t, total+10+1, m.drops(t, group), "its inode number is that of a new socket")

	sockets()
	require.NotContains(t, m.scrape(t, 4*time.Minute), group)
	sockets(queue(group, 5, 4))
	require.Equal(t, total+11+4, m.drops(t, group), "it came back")
	sockets()
	require.Empty(t, m.scrape(t, 6*time.Minute))
	require.Empty(t, m.MachineCollector.sockets)
	require.Empty(t, m.listeners)
	sockets(queue(group, 6, 4))
	require.EqualValues(t, 4, m.drops(t, group), "it was forgotten")

	sockets(queue(group, 6, unknown))
	require.EqualValues(t, unknown, m.drops(t, group))
	sockets(queue(group, 6, 5), queue(group, 7, unknown))
	require.EqualValues(t, unknown, m.drops(t, group), "of one member")
	sockets(queue(group, 6, 5))
	require.NotEqualValues(t, unknown, m.drops(t, group), "it is known again")

	// Both sockets drop one packet in each step. The second changes its name.
	m.holders[8] = []observe.Process{{PID: 7, Name: "nginx"}}
	sockets(queue("[::]:443", 8, 50), queue("[::]:443", 9, 1000))
	require.EqualValues(t, 50, m.drops(t, "nginx [::]:443"))
	m.holders[9] = m.holders[8]
	sockets(queue("[::]:443", 8, 51), queue("[::]:443", 9, 1001))
	require.EqualValues(t, 52, m.scrape(t, 2*time.Minute)["nginx [::]:443"].Drops)
	m.holders[8] = []observe.Process{{PID: 7, Name: "openresty"}}
	m.holders[9] = m.holders[8]
	require.EqualValues(t, 51+1001, m.scrape(t, 2*time.Minute)["openresty [::]:443"].Drops, "a new listener begins with what the kernel has counted")
}

// Sockets with the same labels are a sum, which shows how full the fullest is.
func TestMachineSums(t *testing.T) {
	m := newFakeMachine()
	full := queue("10.0.0.1:80", 2, 1)
	full.Stats.Queued = 8
	m.sockets = []acceptq.Queue{full, queue("10.0.0.1:80", 1, 1), queue("10.0.0.1:81", 3, 1)}
	got := m.scrape(t, 0)["10.0.0.1:80"]
	require.Equal(t, acceptq.Stats{Queued: 10, Incomplete: unknown, Limit: 14, Capacity: 16, Drops: 2}, got.Stats)
	require.Equal(t, 2, got.sockets)
	require.Equal(t, 1.0, got.fullest)

	m.sockets[1].Stats.Queued = unknown
	got = m.scrape(t, 0)["10.0.0.1:80"]
	require.Equal(t, unknown, got.Queued)
	require.EqualValues(t, unknown, got.fullest, "the unknown one may be the fullest")

	reg := prometheus.NewPedanticRegistry()
	require.NoError(t, reg.Register(m))
	samples := gather(t, reg)
	require.Contains(t, samples, `tcp_accept_queue_shards{address="10.0.0.1:80",listener="10.0.0.1:80"}`)
	for absent := range map[string]bool{"tcp_accept_queue_length": true, "tcp_accept_queue_fullest_ratio": true} {
		require.NotContains(t, samples, absent+`{address="10.0.0.1:80",listener="10.0.0.1:80"}`, "it is unknown, not 0")
	}
	require.NotContains(t, samples, `tcp_accept_queue_shards{address="10.0.0.1:81",listener="10.0.0.1:81"}`, "it is one")
}

// Beyond the bound nothing is left out: the rest is a sum, whose counter does not fall either.
func TestMachineBound(t *testing.T) {
	m := newFakeMachine(nil, WithMaxListeners(2))
	m.sockets = []acceptq.Queue{
		queue("10.0.0.1:40000", 4, 4), queue("10.0.0.9:22", 1, 1), queue("10.0.0.1:8080", 3, 3), queue("10.0.0.1:80", 2, 2),
	}
	all := m.scrape(t, 0)
	require.Len(t, all, 3)
	require.EqualValues(t, 1, all["10.0.0.9:22"].Drops)
	require.EqualValues(t, 2, all["10.0.0.1:80"].Drops)
	require.EqualValues(t, 7, all["other"].Drops)
	require.Equal(t, 4, all["other"].Queued)
	require.Equal(t, 0.25, all["other"].fullest)

	// A lower port takes the place of 80, whose old drops are not new ones of the rest.
	m.sockets = append(m.sockets, queue("10.0.0.1:53", 5, 5))
	m.sockets[3].Stats.Drops++
	all = m.scrape(t, 0)
	require.EqualValues(t, 5, all["10.0.0.1:53"].Drops)
	require.NotContains(t, all, "10.0.0.1:80")
	require.EqualValues(t, 7+1, all["other"].Drops)
	require.Equal(t, 3, all["other"].sockets)

	m.sockets = m.sockets[1:2]
	require.NotContains(t, m.scrape(t, 0), "other")
	m.sockets = append(m.sockets, queue("10.0.0.1:8080", 3, 3), queue("10.0.0.1:40000", 4, 9))
	require.EqualValues(t, 8+5, m.drops(t, "other"), "it continues")

	reg := prometheus.NewPedanticRegistry()
	require.NoError(t, reg.Register(m))
	require.EqualValues(t, 1, gather(t, reg)[`tcp_accept_queue_shards{address="other",listener="other",process="other"}`])

	// The default.
	m = newFakeMachine()
	for i := range 1000 {
		m.sockets = append(m.sockets, queue(fmt.Sprint("10.0.0.1:", 1000+i), uint64(i), 0))
	}
	all = m.scrape(t, 0)
	require.Len(t, all, 201)
	require.Equal(t, 800, all["other"].sockets)
}

// A reading of /proc lasts for a minute, unless there is a new socket.
func TestMachineReadsProcRarely(t *testing.T) {
	m := newFakeMachine()
	m.sockets = []acceptq.Queue{queue("10.0.0.1:80", 1, 0)}
	m.holders[1] = []observe.Process{{PID: 1, Name: "systemd"}}
	for range 3 {
		require.Contains(t, m.scrape(t, 15*time.Second), "systemd 10.0.0.1:80")
	}
	require.Equal(t, 1, m.walks)
	require.True(t, m.ProcessesKnown())

	m.holders[1] = append(m.holders[1], observe.Process{PID: 30, Name: ""}, observe.Process{PID: 31, Name: "sshd"}, observe.Process{PID: 32, Name: "sh"})
	require.Contains(t, m.scrape(t, time.Minute), "sshd 10.0.0.1:80", "systemd holds it for another")
	m.holders[2] = []observe.Process{{PID: 5, Name: "nginx"}}
	m.sockets = append(m.sockets, queue("10.0.0.1:81", 2, 0))
	require.Contains(t, m.scrape(t, time.Second), "nginx 10.0.0.1:81")
	require.Equal(t, 3, m.walks)
	m.holders = nil
	require.Contains(t, m.scrape(t, time.Hour), "nginx 10.0.0.1:81", "the name stays until another is known")
	require.Equal(t, 4, m.walks)

	m.answered = time.Minute // a very large machine
	m.scrape(t, 99*time.Minute)
	require.Equal(t, 4, m.walks)
	m.scrape(t, time.Minute)
	require.Equal(t, 5, m.walks)
}

func TestMachineLabels(t *testing.T) {
	for _, tt := range []struct{ addr, device, process, address, listener string }{
		{"0.0.0.0:80", "", "nginx", "0.0.0.0:80", "nginx 0.0.0.0:80"},
		{"[::]:80", "", "", "[::]:80", "[::]:80"},
		{"10.0.0.1:80", "eth0", "", "10.0.0.1%eth0:80", "10.0.0.1%eth0:80"},
		{"[2001:db8::1]:80", "eth0", "h2o", "[2001:db8::1%eth0]:80", "h2o [2001:db8::1%eth0]:80"},
		{"[fe80::1%eth0]:80", "eth0", "h2o", "[fe80::1%eth0]:80", "h2o [fe80::1%eth0]:80"},
	} {
		l := machineListener{netip.MustParseAddrPort(tt.addr), tt.device, tt.process}
		require.Equal(t, tt.address, l.address())
		require.Equal(t, tt.listener, l.String())
	}
}

// If the sockets cannot be listed, the scrape says so. No series becomes 0.
func TestMachineFails(t *testing.T) {
	m := newFakeMachine()
	m.sockets = []acceptq.Queue{queue("10.0.0.1:80", 1, 5)}
	require.EqualValues(t, 5, m.drops(t, "10.0.0.1:80"))
	m.err = errors.New("no netlink today")
	reg := prometheus.NewPedanticRegistry()
	require.NoError(t, reg.Register(m))
	_, err := reg.Gather()
	require.ErrorContains(t, err, "no netlink today")
	m.err = nil
	m.sockets[0].Stats.Drops = 6
	require.EqualValues(t, 6, gather(t, reg)[`tcp_accept_queue_drops_total{address="10.0.0.1:80",listener="10.0.0.1:80"}`])
	problems, err := testutil.GatherAndLint(reg)
	require.NoError(t, err)
	require.Empty(t, problems)

	require.ErrorContains(t, reg.Register(NewCollector()), "different label names", "the doc comment says so")

	c, err := NewMachineCollector()
	if runtime.GOOS != "linux" {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	require.NoError(t, err)
	require.NotNil(t, c)
}
