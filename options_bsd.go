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

// setClosed sets what belongs on a socket before bind(2) and listen(2), and
// refuses what cannot be had.
func (sys *system) setClosed(fd int, o *options) error {
	if o.deferAccept != 0 && !hasFilters {
		return notHere("WithDeferAccept")
	}
	if o.acceptFilter != nil && !hasFilters {
		return notHere("WithAcceptFilter")
	}
	if o.fastOpen == 0 {
		return nil
	}
	if runtime.GOOS != "freebsd" {
		return notHere("WithFastOpen")
	}
	const knob = "net.inet.tcp.fastopen.server_enable"
	if on, err := sys.readSysctl(knob); err == nil && on == 0 {
		return fmt.Errorf("WithFastOpen: %s is 0: sysctl %s=1: %w", knob, knob, errors.ErrUnsupported)
	}
	const tcpFastOpen = 1025 // TCP_FASTOPEN, FreeBSD netinet/tcp.h
	err := sys.setInt(fd, unix.IPPROTO_TCP, tcpFastOpen, 1)
	if errors.Is(err, unix.ENOPROTOOPT) { // a kernel without it
		return fmt.Errorf("WithFastOpen: %w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// setListening sets what a socket takes only after listen(2).
func (sys *system) setListening(fd, limit int, o *options) error {
	if o.fastOpen != 0 && limit != unknown && limit/2 < o.fastOpen {
		return fmt.Errorf("WithFastOpen(%d): granted %d, half the limit: %w", o.fastOpen, limit/2, errors.ErrUnsupported)
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
	err := os.NewSyscallError("setsockopt", sys.setsockoptString(fd, unix.SOL_SOCKET, soAcceptFilter, string(arg[:])))
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("accept filter %q: %s: %w", f.name, loadFilter(f.name), err)
	}
	return err
}

// loadFilter is the command that loads the module of a filter.
func loadFilter(name string) string {
	if runtime.GOOS == "netbsd" {
		return "modload accf_" + name
	}
	module := map[string]string{
		"dataready": "accf_data", "httpready": "accf_http", "dnsready": "accf_dns", "tlsready": "accf_tls",
	}[name]
	if module == "" {
		return "no such filter is loaded"
	}
	return "kldload " + module
}

// bufferKnob names the setting that bounds a buffer.
func bufferKnob(int) string {
	switch runtime.GOOS {
	case "netbsd":
		return "kern.sbmax"
	case "openbsd":
		return "the kernel's SB_MAX"
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
