//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package sockopt

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sys"
)

// HasFilters reports whether the system has accept filters.
const HasFilters = runtime.GOOS == "freebsd" || runtime.GOOS == "netbsd" || runtime.GOOS == "dragonfly"

// SetBeforeListen sets the options that must be set before bind(2) and listen(2). It fails
// if the system does not support an option.
func SetBeforeListen(k *sys.Calls, fd int, o *Options) error {
	if o.DeferAccept != 0 || o.AcceptFilter != nil {
		if err := MustFilter(k); err != nil {
			return fmt.Errorf("%s: %w", o.filterOption(), err)
		}
	}
	if o.FastOpen == 0 {
		return nil
	}
	if runtime.GOOS != "freebsd" {
		return Unsupported("WithFastOpen")
	}
	const knob = "net.inet.tcp.fastopen.server_enable"
	if on, err := k.ReadSysctl(knob); err == nil && on == 0 {
		return fmt.Errorf("WithFastOpen(%d): %s is 0; run sysctl %s=1: %w", o.FastOpen, knob, knob, errors.ErrUnsupported)
	}
	const tcpFastOpen = 1025 // TCP_FASTOPEN, FreeBSD netinet/tcp.h
	err := k.SetInt(fd, unix.IPPROTO_TCP, tcpFastOpen, 1)
	if errors.Is(err, unix.ENOPROTOOPT) { // the kernel was built without it
		return fmt.Errorf("WithFastOpen: %w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// filterOption returns the name of the option that set the accept filter.
func (o *Options) filterOption() string {
	if o.DeferAccept != 0 {
		return "WithDeferAccept"
	}
	return "WithAcceptFilter"
}

// SetAfterListen sets the options that can be set only after listen(2).
func SetAfterListen(k *sys.Calls, fd int, o *Options) error {
	f := o.AcceptFilter
	if o.DeferAccept != 0 {
		f = &AcceptFilter{Name: "dataready"}
	}
	if f == nil {
		return nil
	}
	// struct accept_filter_arg, sys/socket.h: char af_name[16], af_arg[240].
	const nameSize, argSize = 16, 240
	var arg [nameSize + argSize]byte
	copy(arg[:nameSize-1], f.Name)
	copy(arg[nameSize:len(arg)-1], f.Arg)
	err := os.NewSyscallError("setsockopt", k.SetsockoptString(fd, unix.SOL_SOCKET, SoAcceptFilter, string(arg[:])))
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: accept filter %q: %s: %w", o.filterOption(), f.Name, loadFilter(f.Name), err)
	}
	return err
}

// MustFilter returns an error if the kernel has no accept filters, or if it accepts a
// filter and then ignores it.
func MustFilter(k *sys.Calls) error {
	if !HasFilters {
		return errors.ErrUnsupported
	}
	if runtime.GOOS != "freebsd" {
		return nil
	}
	release, err := k.ReadSysctl(ReleaseKnob)
	if err == nil && filtersIgnored(release) {
		return fmt.Errorf("FreeBSD %d (%s) ignores accept filters; FreeBSD 13 and 15.0 do not: %w",
			release, ReleaseKnob, errors.ErrUnsupported)
	}
	return nil
}

// loadFilter returns the command that loads a missing filter, see filterModule.
func loadFilter(name string) string { return filterModule(runtime.GOOS, name) }

// Spreads returns an error if this kernel accepts the option but does not spread
// connections over the listeners of the address.
func Spreads(k *sys.Calls, ep endpoint.Endpoint) error {
	facts := groupFacts{goos: runtime.GOOS, release: sys.Unknown}
	jailed := func(knob string) bool {
		n, err := k.ReadSysctl(knob)
		return err == nil && n == 1
	}
	switch runtime.GOOS {
	case "freebsd":
		if facts.jailed = jailed("security.jail.jailed"); facts.jailed {
			facts.release, _ = k.ReadSysctl(ReleaseKnob)
		}
	case "dragonfly":
		if facts.jailed = jailed("jail.jailed"); facts.jailed {
			facts.release, _ = k.ReadSysctl(ReleaseKnob)
		}
		n, err := k.ReadSysctl(GroupKnob)
		facts.off = err == nil && n == 0
	}
	if why := facts.refusal(ep); why != "" {
		return fmt.Errorf("%s: %w", why, errors.ErrUnsupported)
	}
	return nil
}

// BufferKnob returns a name for what a buffer of n bytes exceeds, see bufferBound.
func BufferKnob(k *sys.Calls, _, n int) string {
	most := sys.Unknown
	if knob, _ := bufferSetting(runtime.GOOS); knob != "" {
		most, _ = k.ReadSysctl(knob)
	}
	return bufferBound(runtime.GOOS, n, most)
}

// KeepAliveNames returns TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_KEEPCNT, from netinet/tcp.h.
// x/sys does not define all of them for each system. OpenBSD does not have them.
func KeepAliveNames() (names [3]int, ok bool) {
	switch runtime.GOOS {
	case "freebsd", "dragonfly":
		return [...]int{0x100, 0x200, 0x400}, true
	case "netbsd":
		return [...]int{3, 5, 6}, true
	case "darwin", "ios":
		return [...]int{0x10, 0x101, 0x102}, true // macOS calls the first TCP_KEEPALIVE
	}
	return names, false
}
