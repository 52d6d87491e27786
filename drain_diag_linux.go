package acceptq

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// This file holds what a drain asks sock_diag(7).

// drainDump is like dump. It stops after drainFlight, because a drain does not wait longer
// for in-flight handshakes.
func (k *kernel) drainDump(ctx context.Context, r diagRequest, keep func(row) bool) ([]row, error) {
	ctx, cancel := context.WithTimeout(ctx, drainFlight)
	defer cancel()
	return k.dump(ctx, r, keep)
}

// handshakes returns the in-flight handshakes on a local port, for all listeners in the
// calling thread's network namespace.
func (k *kernel) handshakes(ctx context.Context, families []uint8, port int) (map[socketID]struct{}, error) {
	found := make(map[socketID]struct{})
	for _, family := range families {
		r := diagRequest{family: family, port: uint16(port), states: 1<<tcpSynRecv | 1<<tcpNewSynRecv}
		_, err := k.drainDump(ctx, r, func(r row) bool {
			found[r.socketID] = struct{}{}
			return false
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// listeners lists the listeners on the port and family of l, in the order of their
// listen(2). For IPv4 the kernel lists the newest first.
func (k *kernel) listeners(ctx context.Context, l *Listener) ([]row, error) {
	addr := l.Addr().(*net.TCPAddr)
	r := diagRequest{family: unix.AF_INET6, port: uint16(addr.Port), states: 1 << tcpListen}
	if addr.IP.To4() != nil {
		r.family = unix.AF_INET
	}
	all, err := k.drainDump(ctx, r, func(row) bool { return true })
	if r.family == unix.AF_INET {
		slices.Reverse(all)
	}
	return all, err
}

// A group is what the members of a SO_REUSEPORT group have in common.
type group struct {
	addr   netip.Addr
	family uint8
	v6only bool
	device uint32
	uid    uint32
}

// groupOf returns the inodes of the group of l in the order of listen(2).
func (k *kernel) groupOf(ctx context.Context, l *Listener, inode uint32) (inodes []uint32, err error) {
	rows, err := k.listeners(ctx, l)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(rows, func(r row) bool { return r.inode == inode })
	if i < 0 {
		return nil, errors.New("sock_diag does not list the listener")
	}
	of := func(r row) group { return group{r.local.Addr(), r.family, r.v6only, r.device, r.uid} }
	for _, r := range rows {
		if of(r) == of(rows[i]) {
			inodes = append(inodes, r.inode)
		}
	}
	return inodes, nil
}
