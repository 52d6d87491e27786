//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"weak"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
)

// A census counts the listeners of this process that share an address. Above a
// maximum the kernel lets a socket bind and listen but assigns no connections to it, see
// sockopt.MaxGroup. The kernel does not report that, and the sockets of other processes cannot be
// counted.
type census struct {
	most    int // the maximum for one address
	mu      sync.Mutex
	members map[endpoint.Endpoint][]*seat
}

// censusOf returns the census of this process.
func censusOf(k *sys.Calls) *census {
	all, _ := k.Memory.LoadOrStore(censusMemory{}, &census{most: sockopt.MaxGroup(runtime.GOOS)})
	return all.(*census)
}

type censusMemory struct{}

// A seat is a socket of a group, or is reserved for one.
type seat struct {
	taken bool // the socket is made, and l points to its Listener
	l     weak.Pointer[Listener]
}

// open reports whether the socket may be open. It asks the socket, because code can close
// it without the methods of the Listener. A Listener that was freed is not counted.
func (m *seat) open() bool {
	if !m.taken {
		return true
	}
	l := m.l.Value()
	return l != nil && l.intake.Raw.Control(func(uintptr) {}) == nil
}

// enter reserves a seat in the group of ep. Port 0 is a free port, which has no group yet.
func (g *census) enter(ep endpoint.Endpoint) (*seat, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for key, members := range g.members {
		if members = slices.DeleteFunc(members, func(m *seat) bool { return !m.open() }); len(members) == 0 {
			delete(g.members, key)
		} else {
			g.members[key] = members
		}
	}
	m, key := new(seat), censusKey(ep)
	if key.At.Port() == 0 {
		return m, nil
	}
	if len(g.members[key]) >= g.most {
		return nil, fmt.Errorf("the kernel assigns connections to %d sockets on one address, and this process has as many: %w",
			g.most, errors.ErrUnsupported)
	}
	g.add(key, m)
	return m, nil
}

func (g *census) add(key endpoint.Endpoint, m *seat) {
	if g.members == nil {
		g.members = make(map[endpoint.Endpoint][]*seat)
	}
	g.members[key] = append(g.members[key], m)
}

// leave gives up the seat m, which enter has reserved for ep.
func (g *census) leave(ep endpoint.Endpoint, m *seat) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := censusKey(ep)
	if i := slices.Index(g.members[key], m); i >= 0 {
		g.members[key] = slices.Delete(g.members[key], i, i+1)
	}
}

// settle gives l the seat m, which enter has reserved for ep.
func (g *census) settle(ep endpoint.Endpoint, m *seat, l *Listener) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.taken, m.l = true, weak.Make(l)
	if ep.At.Port() == 0 {
		ep.At = l.Addr().(*net.TCPAddr).AddrPort()
		g.add(censusKey(ep), m)
	}
}

// censusKey returns ep without the differences that do not matter for its group.
func censusKey(ep endpoint.Endpoint) endpoint.Endpoint {
	ip := ep.At.Addr().Unmap()
	if ep.Wildcard() {
		ip = netip.Addr{}
	}
	return endpoint.Endpoint{Network: ep.Network, At: netip.AddrPortFrom(ip, ep.At.Port())}
}
