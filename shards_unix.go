//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net"
	"runtime"
)

// listenShards makes listeners on one address as long as more says so.
func (k *kernel) listenShards(ctx context.Context, network, address string, o *options, more func(*Listener) bool) error {
	if _, err := reusePort(); err != nil {
		return &net.OpError{Op: "listen", Net: network, Err: notHere("more than one shard")}
	}
	ep, err := k.resolve(ctx, network, address)
	if err != nil {
		return err
	}
	fail := func(err error) error { return &net.OpError{Op: "listen", Net: network, Addr: ep.addr(), Err: err} }
	if !o.reusePort {
		if err := k.spreads(ep); err != nil {
			return fail(fmt.Errorf("more than one shard: %w", err))
		}
		alone := o
		sharing := *o
		sharing.reusePort = true
		o = &sharing
		switch runtime.GOOS {
		case "linux", "android":
			// The first shard listens without the option, as no two can on one
			// address, and gets it then; the second makes a group of them. That it is
			// bound proves nothing: until they listen, two that start together both are.
			l, err := k.open(ctx, ep, alone)
			if err != nil {
				return fail(err)
			}
			ep.at = l.Addr().(*net.TCPAddr).AddrPort()
			operr := l.raw.Control(func(fd uintptr) { err = k.setReusePort(int(fd)) })
			if err := cmp.Or(operr, err); err != nil {
				l.Close()
				return fail(err)
			}
			if !more(l) {
				return nil
			}
		default:
			// The address is claimed by a socket without the option, beside which no
			// other can be bound. It gets the option then, so that the shards can be,
			// and never listens: FreeBSD spreads over those that were bound with it.
			claim, err := k.bindSocket(ep, alone)
			if err != nil {
				return fail(err)
			}
			defer claim.Close()
			if err := k.setReusePort(int(claim.Fd())); err != nil {
				return fail(err)
			}
			if ep.at, err = k.localAddr(int(claim.Fd())); err != nil {
				return fail(err)
			}
		}
	}
	for range maxGroup() {
		l, err := k.open(ctx, ep, o)
		if err != nil {
			return fail(err)
		}
		ep.at = l.Addr().(*net.TCPAddr).AddrPort()
		if !more(l) {
			return nil
		}
	}
	return fail(notHere(fmt.Sprintf("more than %d shards", maxGroup())))
}

// maxGroup is how many listeners the kernel spreads over. FreeBSD and DragonFly let
// more be bound and give them nothing (INPCBLBGROUP_SIZMAX and
// INP_LOCALGROUP_SIZMAX in netinet/in_pcb.c).
func maxGroup() int {
	switch runtime.GOOS {
	case "freebsd", "dragonfly":
		return 256
	}
	return math.MaxInt
}
