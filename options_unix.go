//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// setOptions sets what net.Listen sets, then what was asked for.
func (k *kernel) setOptions(fd int, ep endpoint, o *options) error {
	if ep.network == "tcp6" {
		if err := k.setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, boolInt(ep.v6only)); err != nil {
			return err
		}
	}
	if runtime.GOOS == "dragonfly" {
		// Its default range of ephemeral ports is narrow, see net/sockopt_bsd.go.
		const ipPortRange, ipv6PortRange, high = 0x13, 0xe, 1 // netinet/in.h, netinet6/in6.h
		level, name := unix.IPPROTO_IP, ipPortRange
		if ep.network == "tcp6" {
			level, name = unix.IPPROTO_IPV6, ipv6PortRange
		}
		if err := k.setInt(fd, level, name, high); err != nil {
			return err
		}
	}
	if err := k.setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if o.reusePort {
		if err := k.spreads(ep); err != nil {
			return fmt.Errorf("WithReusePort: %w", err)
		}
		if err := k.setReusePort(fd); err != nil {
			return err
		}
	}
	if err := k.setBuffer(fd, "WithReceiveBuffer", unix.SO_RCVBUF, o.receiveBuffer); err != nil {
		return err
	}
	if err := k.setBuffer(fd, "WithSendBuffer", unix.SO_SNDBUF, o.sendBuffer); err != nil {
		return err
	}
	return k.setBeforeListen(fd, o)
}

func (k *kernel) setReusePort(fd int) error {
	name, err := reusePort()
	if err != nil {
		return err
	}
	return k.setInt(fd, unix.SOL_SOCKET, name, 1)
}

// setBuffer asks for a buffer of n bytes, if n is not 0, and sees to it that it
// was granted: on Linux and macOS a smaller one is no error of the kernel's.
func (k *kernel) setBuffer(fd int, option string, name, n int) error {
	if n == 0 {
		return nil
	}
	err := k.setInt(fd, unix.SOL_SOCKET, name, min(n, math.MaxInt32))
	if errors.Is(err, unix.ENOBUFS) { // the BSDs do say so
		return fmt.Errorf("%s(%d): more than %s: %w: %w", option, n, bufferKnob(name), errors.ErrUnsupported, err)
	}
	if err != nil {
		return err
	}
	granted, err := k.getInt(fd, unix.SOL_SOCKET, name)
	if err != nil {
		return err
	}
	if runtime.GOOS == "linux" || runtime.GOOS == "android" {
		granted /= 2 // the kernel doubles it for its own needs, socket(7)
	}
	if granted < n {
		return fmt.Errorf("%s(%d): granted %d, see %s: %w", option, n, granted, bufferKnob(name), errors.ErrUnsupported)
	}
	return nil
}

// tryKeepAlive sets the values of config on a socket of the endpoint's family
// that is closed again: a value that the kernel refuses there, it would refuse on
// each connection. The listening socket is not used for it, because NetBSD and macOS
// end a listening socket that sends keep-alive probes.
//
// It returns the values to set on each connection. A negative one is replaced by the
// system's own, because net has set another by the time a connection is accepted.
func (k *kernel) tryKeepAlive(ep endpoint, config *net.KeepAliveConfig) (*net.KeepAliveConfig, error) {
	if config == nil || !config.Enable {
		return config, nil
	}
	names, ok := keepAliveNames()
	if !ok { // net cannot set the values either, and fails unless they are negative
		if max(config.Idle, config.Interval) >= 0 || config.Count >= 0 {
			return nil, notHere("WithKeepAlive with a time or a count")
		}
		return config, nil
	}
	fd, err := k.socket(ep.domain())
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	try := func(name, n int) (int, error) {
		switch {
		case n > 0:
			return n, k.setInt(fd, unix.IPPROTO_TCP, name, n)
		case n < 0:
			n, err := k.getInt(fd, unix.IPPROTO_TCP, name)
			if err == nil && n == 0 {
				// The kernel rounds a time under a second down to 0, which to net is its
				// own default.
				return 0, fmt.Errorf("the system's own value is less than 1, which cannot be set: %w", errors.ErrUnsupported)
			}
			return n, err
		}
		return 0, nil // net's default
	}
	idle, err := try(names[0], seconds(config.Idle))
	interval, err1 := try(names[1], seconds(config.Interval))
	count, err2 := try(names[2], config.Count)
	err = cmp.Or(err, err1, err2)
	if errors.Is(err, unix.ENOPROTOOPT) { // NetBSD may not tell its own values
		return nil, fmt.Errorf("WithKeepAlive: %w: %w", errors.ErrUnsupported, err)
	}
	if err != nil {
		return nil, fmt.Errorf("WithKeepAlive: %w", err)
	}
	return &net.KeepAliveConfig{
		Enable:   true,
		Idle:     time.Duration(idle) * time.Second,
		Interval: time.Duration(interval) * time.Second,
		Count:    count,
	}, nil
}

// seconds rounds d up to whole seconds in 32 bits, as net does. A negative d is -1.
func seconds(d time.Duration) int {
	if d < 0 {
		return -1
	}
	whole := d / time.Second
	if d%time.Second > 0 {
		whole++
	}
	return int(min(whole, math.MaxInt32))
}

// reusePort is the socket option with which the kernel spreads connections over
// the listeners of one address. SO_REUSEPORT of macOS, NetBSD, OpenBSD and
// FreeBSD gives them all to one.
func reusePort() (name int, err error) {
	switch runtime.GOOS {
	case "linux", "android", "dragonfly":
		return unix.SO_REUSEPORT, nil
	case "freebsd":
		return 0x10000, nil // SO_REUSEPORT_LB, sys/socket.h; x/sys has it for FreeBSD only
	}
	return 0, notHere("WithReusePort")
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
