package sockopt

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// SetBeforeListen sets the options that must be set before bind(2) and listen(2).
func SetBeforeListen(k *sys.Calls, fd int, o *Options) error {
	if o.AcceptFilter != nil {
		return Unsupported("WithAcceptFilter")
	}
	if o.DeferAccept != 0 {
		if err := setDeferAccept(k, fd, o.DeferAccept); err != nil {
			return err
		}
	}
	if o.FastOpen != 0 {
		return setFastOpen(k, fd, o.FastOpen)
	}
	return nil
}

// setDeferAccept requests d and checks that the kernel grants it. The kernel counts
// retransmissions of the SYN-ACK in 8 bits and silently clamps longer times.
func setDeferAccept(k *sys.Calls, fd int, d time.Duration) error {
	wait := seconds(d)
	if err := k.SetInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, wait); err != nil {
		return err
	}
	granted, err := k.GetInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT)
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
func setFastOpen(k *sys.Calls, fd, qlen int) error {
	const server = 2 // the bit of net.ipv4.tcp_fastopen, networking/ip-sysctl.rst
	text, _ := k.ReadFile("/proc/sys/net/ipv4/tcp_fastopen")
	if bits, err := sys.ParseNumber(string(text)); err == nil && bits&server == 0 {
		return fmt.Errorf("WithFastOpen(%d): net.ipv4.tcp_fastopen is %d, without the bit for servers; run sysctl -w net.ipv4.tcp_fastopen=%d: %w",
			qlen, bits, bits|server, errors.ErrUnsupported)
	}
	if err := k.SetInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, min(qlen, math.MaxInt32)); err != nil {
		return err
	}
	granted, err := k.GetInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN)
	if err != nil {
		return err
	}
	if granted < qlen {
		return fmt.Errorf("WithFastOpen(%d): granted %d; raise net.core.somaxconn: %w", qlen, granted, errors.ErrUnsupported)
	}
	return nil
}

// SetAfterListen does nothing: on Linux no option has to wait for listen(2).
func SetAfterListen(k *sys.Calls, _ int, _ *Options) error { return nil }

// BufferKnob returns the name of the setting that is the maximum of a buffer.
func BufferKnob(k *sys.Calls, name, _ int) string {
	if name == unix.SO_RCVBUF {
		return "net.core.rmem_max"
	}
	return "net.core.wmem_max"
}

// KeepAliveNames returns TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_KEEPCNT.
func KeepAliveNames() (names [3]int, ok bool) {
	return [...]int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT}, true
}

// Spreads returns nil: Linux spreads connections over the listeners of every address.
func Spreads(k *sys.Calls, _ endpoint.Endpoint) error { return nil }
