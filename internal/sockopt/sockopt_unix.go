//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sockopt

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

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// SetBeforeBind sets the options that net.Listen sets, and then those of the caller.
func SetBeforeBind(k *sys.Calls, fd int, ep endpoint.Endpoint, o *Options) error {
	if ep.Network == "tcp6" {
		if err := k.SetInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, BoolInt(ep.V6Only)); err != nil {
			return err
		}
	}
	if runtime.GOOS == "dragonfly" {
		// The default range of ephemeral ports is narrow, see net/sockopt_bsd.go.
		const ipPortRange, ipv6PortRange, high = 0x13, 0xe, 1 // netinet/in.h, netinet6/in6.h
		level, name := unix.IPPROTO_IP, ipPortRange
		if ep.Network == "tcp6" {
			level, name = unix.IPPROTO_IPV6, ipv6PortRange
		}
		if err := k.SetInt(fd, level, name, high); err != nil {
			return err
		}
	}
	if err := k.SetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if o.ReusePort {
		if err := Spreads(k, ep); err != nil {
			return fmt.Errorf("WithReusePort: %w", err)
		}
		if err := SetReusePort(k, fd); err != nil {
			return err
		}
	}
	if err := setBuffer(k, fd, "WithReceiveBuffer", unix.SO_RCVBUF, o.ReceiveBuffer); err != nil {
		return err
	}
	if err := setBuffer(k, fd, "WithSendBuffer", unix.SO_SNDBUF, o.SendBuffer); err != nil {
		return err
	}
	return SetBeforeListen(k, fd, o)
}

// SetReusePort sets the option of ReusePort.
func SetReusePort(k *sys.Calls, fd int) error {
	name, err := ReusePort()
	if err != nil {
		return err
	}
	return k.SetInt(fd, unix.SOL_SOCKET, name, 1)
}

// setBuffer requests a buffer of n bytes, if n is not 0, and checks that the kernel grants
// it. Linux and macOS silently grant a smaller buffer.
func setBuffer(k *sys.Calls, fd int, option string, name, n int) error {
	if n == 0 {
		return nil
	}
	err := k.SetInt(fd, unix.SOL_SOCKET, name, min(n, math.MaxInt32))
	if errors.Is(err, unix.ENOBUFS) { // the BSDs report an error
		return fmt.Errorf("%s(%d): more than %s; raise that or request less: %w: %w",
			option, n, BufferKnob(k, name, n), errors.ErrUnsupported, err)
	}
	if err != nil {
		return err
	}
	granted, err := k.GetInt(fd, unix.SOL_SOCKET, name)
	if err != nil {
		return err
	}
	if runtime.GOOS == "linux" || runtime.GOOS == "android" {
		granted /= 2 // the kernel doubles the value for its overhead, socket(7)
	}
	if granted < n {
		return fmt.Errorf("%s(%d): granted %d; raise %s or request less: %w",
			option, n, granted, BufferKnob(k, name, n), errors.ErrUnsupported)
	}
	return nil
}

// TryKeepAlive sets the values of config on a temporary socket of the endpoint's family.
// If the kernel refuses a value there, it would refuse it on each connection. The
// listening socket is not used, because NetBSD and macOS end a listening socket that has
// keep-alive.
//
// TryKeepAlive returns the values to set on each connection. It replaces a negative value
// with that of the system, because package net sets its default on each connection first.
func TryKeepAlive(k *sys.Calls, ep endpoint.Endpoint, config *net.KeepAliveConfig) (*net.KeepAliveConfig, error) {
	if config == nil || !config.Enable {
		return config, nil
	}
	names, ok := KeepAliveNames()
	if !ok { // package net cannot set the values either, and fails unless they are negative
		if max(config.Idle, config.Interval) >= 0 || config.Count >= 0 {
			return nil, Unsupported("WithKeepAlive with a time or a count")
		}
		return config, nil
	}
	fd, err := k.Socket(ep.Domain())
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	try := func(name, n int) (int, error) {
		switch {
		case n > 0:
			return n, k.SetInt(fd, unix.IPPROTO_TCP, name, n)
		case n < 0:
			n, err := k.GetInt(fd, unix.IPPROTO_TCP, name)
			if err == nil && n == 0 {
				// The kernel rounds a time below 1 s down to 0. Package net would treat 0
				// as its default.
				return 0, fmt.Errorf("the value of the system is less than 1 and cannot be set: %w", errors.ErrUnsupported)
			}
			return n, err
		}
		return 0, nil // the default of package net
	}
	idle, err := try(names[0], seconds(config.Idle))
	interval, err1 := try(names[1], seconds(config.Interval))
	count, err2 := try(names[2], config.Count)
	err = cmp.Or(err, err1, err2)
	if errors.Is(err, unix.ENOPROTOOPT) { // NetBSD may not report the values of the system
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

// seconds rounds d up to whole seconds in 32 bits, as package net does. It returns -1 for
// a negative d.
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

// ReusePort returns the socket option that makes the kernel spread connections over the
// listeners of one address. With SO_REUSEPORT, macOS, NetBSD, OpenBSD and FreeBSD assign
// all connections to one listener.
func ReusePort() (name int, err error) {
	switch runtime.GOOS {
	case "linux", "android", "dragonfly":
		return unix.SO_REUSEPORT, nil
	case "freebsd":
		return 0x10000, nil // SO_REUSEPORT_LB, sys/socket.h; x/sys defines it for FreeBSD only
	}
	return 0, Unsupported("WithReusePort")
}

// BoolInt returns 1 for true and 0 for false.
func BoolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// SoAcceptFilter is SO_ACCEPTFILTER, sys/socket.h of the BSDs.
const SoAcceptFilter = 0x1000
