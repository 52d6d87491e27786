//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// sysctlUnsigned reads a number of 32 or 64 bits, or a boolean of 8 bits.
func sysctlUnsigned(name string) (uint32, error) {
	n, err := unix.SysctlUint32(name)
	if err != unix.EIO { // EIO means that the value does not have 32 bits
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
func (k *kernel) bounds() (ceiling, floor int, err error) {
	r := hostRule()
	if r.knob == "" {
		return r.compiled, 0, nil
	}
	if ceiling, err = k.readCeiling(r.knob); errors.Is(err, unix.ENOENT) && r.formerKnob != "" {
		ceiling, err = k.readCeiling(r.formerKnob)
	}
	if err == nil && r.floor != "" {
		floor, err = k.readSysctl(r.floor)
	}
	return ceiling, floor, err
}

// boundsOf is bounds: one ceiling holds for all sockets that a process can make.
func (k *kernel) boundsOf(int) (ceiling, floor int, err error) { return k.bounds() }

func (k *kernel) readSysctl(name string) (int, error) {
	n, err := k.sysctl(name)
	if err != nil {
		return unknown, os.NewSyscallError("sysctl "+name, err)
	}
	return sysctlCount(n), nil
}

func (k *kernel) readCeiling(name string) (int, error) {
	n, err := k.sysctl(name)
	if err == nil {
		n, err := sysctlCeiling(n)
		return n, os.NewSyscallError("sysctl "+name, err)
	}
	return unknown, os.NewSyscallError("sysctl "+name, err)
}

const cookiesKnob = "net.inet.tcp.syncookies" // FreeBSD

// readSettings sets the fields of s that FreeBSD reports, except the ceiling. It does not
// read counters, because their structure changes between releases.
func (k *kernel) readSettings(s *System) {
	if runtime.GOOS != "freebsd" {
		return
	}
	s.SYNCookies, _ = k.readSysctl(cookiesKnob)
	s.AbortOnOverflow, _ = k.readSysctl("net.inet.tcp.syncache.rst_on_sock_fail")
}
