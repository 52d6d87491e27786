//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"sync"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// A Census counts the listeners of this process that share an address. Above a maximum the
// kernel lets a socket bind and listen but assigns no connections to it, see [MaxGroup]. The
// kernel does not report that, and the sockets of other processes cannot be counted.
type Census struct {
	most    int // the maximum for one address
	mu      sync.Mutex
	members map[endpoint.Endpoint][]*Seat
}

// CensusOf returns the census of this process.
func CensusOf(k *sys.Calls) *Census { return NewCensus(k, MaxGroup(runtime.GOOS)) }

// NewCensus returns the census of this process. If there is none yet, its maximum is most.
func NewCensus(k *sys.Calls, most int) *Census {
	all, _ := k.Memory.LoadOrStore(censusMemory{}, &Census{most: most})
	return all.(*Census)
}

type censusMemory struct{}

// A Seat is a socket of a group, or is reserved for one.
type Seat struct {
	isOpen func() bool // nil until the socket is made
}

// open reports whether the socket may be open.
func (m *Seat) open() bool { return m.isOpen == nil || m.isOpen() }

// Enter reserves a seat in the group of ep. Port 0 is a free port, which has no group yet.
// Without a maximum there is no seat, and Enter returns nil.
func (g *Census) Enter(ep endpoint.Endpoint) (*Seat, error) {
	if g.most == math.MaxInt {
		return nil, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for key, members := range g.members {
		if members = slices.DeleteFunc(members, func(m *Seat) bool { return !m.open() }); len(members) == 0 {
			delete(g.members, key)
		} else {
			g.members[key] = members
		}
	}
	m, key := new(Seat), censusKey(ep)
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

func (g *Census) add(key endpoint.Endpoint, m *Seat) {
	if g.members == nil {
		g.members = make(map[endpoint.Endpoint][]*Seat)
	}
	g.members[key] = append(g.members[key], m)
}

// Leave gives up the seat m, which Enter has reserved for ep.
func (g *Census) Leave(ep endpoint.Endpoint, m *Seat) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := censusKey(ep)
	if i := slices.Index(g.members[key], m); i >= 0 {
		g.members[key] = slices.Delete(g.members[key], i, i+1)
	}
}

// Settle gives the seat m, which Enter has reserved for ep, to a socket that listens at addr.
// isOpen reports whether that socket may be open.
func (g *Census) Settle(ep endpoint.Endpoint, m *Seat, addr netip.AddrPort, isOpen func() bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.isOpen = isOpen
	if ep.At.Port() == 0 {
		ep.At = addr
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
