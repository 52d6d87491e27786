//go:build dragonfly || freebsd

package testkit

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// groupOption is the socket option with which the kernel can spread connections, set
// without the library.
func groupOption() int {
	if runtime.GOOS == "freebsd" {
		return 0x10000 // SO_REUSEPORT_LB
	}
	return unix.SO_REUSEPORT
}

// GroupShares opens two listeners on one address with groupOption, and counts the
// clients that each gets.
func GroupShares(network, host string) (shares [2]int, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, groupOption(), 1)
		})
		return errors.Join(cerr, err)
	}}
	const clients = 30 // that one of two that share gets all has a chance of 1 in 2^29
	address := net.JoinHostPort(host, "0")
	accepted := make(chan int, clients)
	var loops sync.WaitGroup
	defer loops.Wait()
	for i := range shares {
		ln, err := lc.Listen(context.Background(), network, address)
		if err != nil {
			return shares, err
		}
		defer ln.Close()
		address = ln.Addr().String()
		loops.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
				accepted <- i
			}
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), TooLong)
	defer cancel()
	addr, err := net.ResolveTCPAddr(network, address)
	if err != nil {
		return shares, err
	}
	for range clients {
		c, err := dialSpread(ctx, addr)
		if err != nil {
			return shares, err
		}
		defer c.Close()
	}
	late := time.After(TooLong)
	for range clients {
		select {
		case i := <-accepted:
			shares[i]++
		case <-late:
			return shares, errors.New("not all clients were accepted")
		}
	}
	return shares, nil
}

var kernelSpreads = sync.OnceValue(func() bool {
	shares, err := GroupShares("tcp4", "127.0.0.1")
	return err == nil && shares[0] > 0 && shares[1] > 0
})
