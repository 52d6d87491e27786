//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"runtime"
)

// listenShards makes listeners on one address until more returns false.
func (k *kernel) listenShards(ctx context.Context, network, addr string, o *options, more func(*Listener) bool) error {
	if _, err := reusePort(); err != nil {
		return &net.OpError{Op: "listen", Net: network, Err: notHere("ListenShards: more than one shard")}
	}
	ep, err := k.resolve(ctx, network, addr)
	if err != nil {
		return err
	}
	fail := func(err error) error { return &net.OpError{Op: "listen", Net: network, Addr: ep.addr(), Err: err} }
	if !o.reusePort {
		if err := k.spreads(ep); err != nil {
			return fail(fmt.Errorf("ListenShards: more than one shard: %w", err))
		}
		alone := o
		sharing := *o
		sharing.reusePort = true
		o = &sharing
		switch runtime.GOOS {
		case "linux", "android":
			// The first shard listens without the option, so that it fails if another
			// process listens on the address. Then it gets the option, so that the other
			// shards can join. bind(2) alone does not prove that the address is free:
			// two processes can bind to it as long as neither listens.
			l, err := k.open(ctx, ep, alone)
			if err != nil {
				return fail(err)
			}
			ep.at = l.Addr().(*net.TCPAddr).AddrPort()
			operr := l.intake.raw.Control(func(fd uintptr) { err = k.setReusePort(int(fd)) })
			if err := cmp.Or(operr, err); err != nil {
				l.Close()
				return fail(err)
			}
			l.intake.reusePort = true
			if !more(l) {
				return nil
			}
		default:
			// A socket without the option reserves the address, because no other socket
			// can bind to it then. Then it gets the option, so that the shards can bind.
			// It never listens: FreeBSD does not assign clients to a socket that was
			// bound without the option.
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
	most := maxGroup(runtime.GOOS)
	for range most {
		l, err := k.open(ctx, ep, o)
		if err != nil {
			return fail(err)
		}
		ep.at = l.Addr().(*net.TCPAddr).AddrPort()
		if !more(l) {
			return nil
		}
	}
	return fail(notHere(fmt.Sprintf("ListenShards: more than %d shards", most)))
}
