//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// hasFilters says that the system has accept filters.
const hasFilters = runtime.GOOS == "freebsd" || runtime.GOOS == "netbsd" || runtime.GOOS == "dragonfly"

// setBeforeListen sets what belongs on a socket before bind(2) and listen(2), and
// refuses what cannot be had.
func (k *kernel) setBeforeListen(fd int, o *options) error {
	if o.deferAccept != 0 || o.acceptFilter != nil {
		if err := k.mustFilter(); err != nil {
			option := "WithAcceptFilter"
			if o.deferAccept != 0 {
				option = "WithDeferAccept"
			}
			return fmt.Errorf("%s: %w", option, err)
		}
	}
	if o.fastOpen == 0 {
		return nil
	}
	if runtime.GOOS != "freebsd" {
		return notHere("WithFastOpen")
	}
	const knob = "net.inet.tcp.fastopen.server_enable"
	if on, err := k.readSysctl(knob); err == nil && on == 0 {
		return fmt.Errorf("WithFastOpen: %s is 0: sysctl %s=1: %w", knob, knob, errors.ErrUnsupported)
	}
	const tcpFastOpen = 1025 // TCP_FASTOPEN, FreeBSD netinet/tcp.h
	err := k.setInt(fd, unix.IPPROTO_TCP, tcpFastOpen, 1)
	if errors.Is(err, unix.ENOPROTOOPT) { // a kernel without it
		return fmt.Errorf("WithFastOpen: %w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// setAfterListen sets what a socket takes only after listen(2).
func (k *kernel) setAfterListen(fd, limit int, o *options) error {
	if err := fastOpenFits(runtime.GOOS, o.fastOpen, limit); err != nil {
		return err
	}
	f := o.acceptFilter
	if o.deferAccept != 0 {
		f = &acceptFilter{name: "dataready"}
	}
	if f == nil {
		return nil
	}
	// struct accept_filter_arg, sys/socket.h: char af_name[16], af_arg[240].
	const soAcceptFilter, nameSize, argSize = 0x1000, 16, 240
	var arg [nameSize + argSize]byte
	copy(arg[:nameSize-1], f.name)
	copy(arg[nameSize:len(arg)-1], f.arg)
	err := os.NewSyscallError("setsockopt", k.setsockoptString(fd, unix.SOL_SOCKET, soAcceptFilter, string(arg[:])))
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("accept filter %q: %s: %w", f.name, loadFilter(f.name), err)
	}
	return err
}

// mustFilter refuses a kernel that has no accept filters, or that takes one and
// ignores it.
func (k *kernel) mustFilter() error {
	if !hasFilters {
		return errors.ErrUnsupported
	}
	if runtime.GOOS != "freebsd" {
		return nil
	}
	release, err := k.readSysctl(releaseKnob)
	if err == nil && filtersIgnored(release) {
		return fmt.Errorf("FreeBSD %d (%s) takes accept filters and ignores them; 13 and 15.0 do not: %w",
			release, releaseKnob, errors.ErrUnsupported)
	}
	return nil
}

// loadFilter tells how to load a filter that is missing.
func loadFilter(name string) string { return filterModule(runtime.GOOS, name) }

// spreads refuses an address over whose listeners this kernel does not spread
// connections, though it takes the option.
func (k *kernel) spreads(ep endpoint) error {
	facts := groupFacts{goos: runtime.GOOS, release: unknown}
	jailed := func(knob string) bool {
		n, err := k.readSysctl(knob)
		return err == nil && n == 1
	}
	switch runtime.GOOS {
	case "freebsd":
		if facts.jailed = jailed("security.jail.jailed"); facts.jailed {
			facts.release, _ = k.readSysctl(releaseKnob)
		}
	case "dragonfly":
		facts.jailed = jailed("jail.jailed")
		n, err := k.readSysctl(groupKnob)
		facts.off = err == nil && n == 0
	}
	if why := facts.refusal(ep); why != "" {
		return fmt.Errorf("%s: %w", why, errors.ErrUnsupported)
	}
	return nil
}

// bufferKnob names what bounds a buffer. The kernel counts an mbuf's header with
// each cluster (sb_max_adj in kern/uipc_sockbuf.c, uipc_socket2.c), so a buffer
// cannot have the whole of the setting.
func bufferKnob(int) string {
	switch runtime.GOOS {
	case "freebsd":
		return "8/9 of kern.ipc.maxsockbuf"
	case "netbsd":
		return "4/5 of kern.sbmax"
	case "openbsd":
		return "the kernel's SB_MAX"
	case "dragonfly":
		return "the usable part of kern.ipc.maxsockbuf"
	}
	return "kern.ipc.maxsockbuf"
}

// keepAliveNames are the options of TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_KEEPCNT, from
// netinet/tcp.h; x/sys does not have each for each. OpenBSD has none.
func keepAliveNames() (names [3]int, ok bool) {
	switch runtime.GOOS {
	case "freebsd", "dragonfly":
		return [...]int{0x100, 0x200, 0x400}, true
	case "netbsd":
		return [...]int{3, 5, 6}, true
	case "darwin", "ios":
		return [...]int{0x10, 0x101, 0x102}, true // the first is TCP_KEEPALIVE
	}
	return names, false
}
