//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// sysctlUnsigned reads a number of 32 bits or a truth value of 8.
func sysctlUnsigned(name string) (uint32, error) {
	n, err := unix.SysctlUint32(name)
	if err != unix.EIO { // which stands for another width
		return n, err
	}
	raw, err := unix.SysctlRaw(name)
	if err != nil {
		return 0, err
	}
	if n, ok := sysctlNumber(raw); ok {
		return n, nil
	}
	return 0, unix.EIO
}

// bounds reads the ceiling and, on OpenBSD, the floor of listen(2).
func (sys *system) bounds() (ceiling, floor int, err error) {
	r, _ := ruleOf(runtime.GOOS)
	if r.knob == "" {
		return r.compiled, 0, nil
	}
	if ceiling, err = sys.readSysctl(r.knob); errors.Is(err, unix.ENOENT) && r.formerKnob != "" {
		ceiling, err = sys.readSysctl(r.formerKnob)
	}
	if err == nil && r.floor != "" {
		floor, err = sys.readSysctl(r.floor)
	}
	return ceiling, floor, err
}

func (sys *system) readSysctl(name string) (int, error) {
	n, err := sys.sysctl(name)
	if err != nil {
		return unknown, os.NewSyscallError("sysctl "+name, err)
	}
	return sysctlCount(n), nil
}

// describe fills in what FreeBSD says of listening besides the ceiling. Its
// counters are in a structure whose layout moves between releases.
func (sys *system) describe(s *System) {
	if runtime.GOOS != "freebsd" {
		return
	}
	s.SYNCookies, _ = sys.readSysctl(cookiesKnob)
	s.AbortOnOverflow, _ = sys.readSysctl("net.inet.tcp.syncache.rst_on_sock_fail")
}
