//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// readBounds reads the ceiling and, on OpenBSD, the floor of listen(2).
func readBounds(k *sys.Calls) (ceiling, floor int, err error) {
	r := hostRule()
	if r.knob == "" {
		return r.compiled, 0, nil
	}
	if ceiling, err = readCeiling(k, r.knob); errors.Is(err, unix.ENOENT) && r.formerKnob != "" {
		ceiling, err = readCeiling(k, r.formerKnob)
	}
	if err == nil && r.floor != "" {
		floor, err = k.ReadSysctl(r.floor)
	}
	return ceiling, floor, err
}

// readBoundsOf is bounds: one ceiling holds for all sockets that a process can make.
func readBoundsOf(k *sys.Calls, _ int) (ceiling, floor int, err error) { return readBounds(k) }

func readCeiling(k *sys.Calls, name string) (int, error) {
	n, err := k.Sysctl(name)
	if err == nil {
		n, err := sysctlCeiling(n)
		return n, os.NewSyscallError("sysctl "+name, err)
	}
	return unknown, os.NewSyscallError("sysctl "+name, err)
}

const cookiesKnob = "net.inet.tcp.syncookies" // FreeBSD

// readSettings sets the fields of s that FreeBSD reports, except the ceiling. It does not
// read counters, because their structure changes between releases.
func readSettings(k *sys.Calls, s *System) error {
	if runtime.GOOS != "freebsd" {
		return nil
	}
	s.SYNCookies, _ = k.ReadSysctl(cookiesKnob)
	s.AbortOnOverflow, _ = k.ReadSysctl("net.inet.tcp.syncache.rst_on_sock_fail")
	return nil // sysctl(3) needs no descriptor
}
