package acceptq

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// setBeforeListen sets the options that must be set before bind(2) and listen(2).
func (k *kernel) setBeforeListen(fd int, o *settings) error {
	if o.acceptFilter != nil {
		return notHere("WithAcceptFilter")
	}
	if o.deferAccept != 0 {
		if err := k.setDeferAccept(fd, o.deferAccept); err != nil {
			return err
		}
	}
	if o.fastOpen != 0 {
		return k.setFastOpen(fd, o.fastOpen)
	}
	return nil
}

// setDeferAccept requests d and checks that the kernel grants it. The kernel counts
// retransmissions of the SYN-ACK in 8 bits and silently clamps longer times.
func (k *kernel) setDeferAccept(fd int, d time.Duration) error {
	wait := seconds(d)
	if err := k.setInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, wait); err != nil {
		return err
	}
	granted, err := k.getInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT)
	if err != nil {
		return err
	}
	if granted < wait {
		return fmt.Errorf("WithDeferAccept(%v): granted %v, the maximum of the kernel: %w", d, time.Duration(granted)*time.Second, errors.ErrUnsupported)
	}
	return nil
}

// setFastOpen sets the option and checks that it takes effect. The kernel accepts the
// option even if servers may not use it, and silently clamps the number.
func (k *kernel) setFastOpen(fd, qlen int) error {
	const server = 2 // the bit of net.ipv4.tcp_fastopen, networking/ip-sysctl.rst
	text, _ := k.readFile("/proc/sys/net/ipv4/tcp_fastopen")
	if bits, err := parseSysctl(string(text)); err == nil && bits&server == 0 {
		return fmt.Errorf("WithFastOpen(%d): net.ipv4.tcp_fastopen is %d, without the bit for servers; run sysctl -w net.ipv4.tcp_fastopen=%d: %w",
			qlen, bits, bits|server, errors.ErrUnsupported)
	}
	if err := k.setInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, min(qlen, math.MaxInt32)); err != nil {
		return err
	}
	granted, err := k.getInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN)
	if err != nil {
		return err
	}
	if granted < qlen {
		return fmt.Errorf("WithFastOpen(%d): granted %d; raise net.core.somaxconn: %w", qlen, granted, errors.ErrUnsupported)
	}
	return nil
}

// setAfterListen does nothing: on Linux no option has to wait for listen(2).
func (k *kernel) setAfterListen(int, *settings) error { return nil }

// bufferKnob returns the name of the setting that is the maximum of a buffer.
func (k *kernel) bufferKnob(name, _ int) string {
	if name == unix.SO_RCVBUF {
		return "net.core.rmem_max"
	}
	return "net.core.wmem_max"
}

// keepAliveNames returns TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_KEEPCNT.
func keepAliveNames() (names [3]int, ok bool) {
	return [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, true
}

// spreads returns nil: Linux spreads connections over the listeners of every address.
func (k *kernel) spreads(endpoint) error { return nil }
