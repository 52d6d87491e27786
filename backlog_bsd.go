//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// kernel is what the package asks of the BSDs and macOS only.
type kernel struct {
	sysctl func(name string) (uint32, error)
}

var realKernel = kernel{
	sysctl: func(name string) (uint32, error) { return unix.SysctlUint32(name) },
}

// Options of a listening socket on FreeBSD, from sys/socket.h; x/sys has them
// for FreeBSD only.
const (
	soListenQueueLimit = 0x1011 // SO_LISTENQLIMIT
)

// limit reads the limit of the listening socket fd. FreeBSD alone has an option
// that tells it (getsockopt(2)).
func (sys *system) limit(fd int) (limit int, ok bool) {
	if runtime.GOOS != "freebsd" {
		return unknown, false
	}
	n, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, soListenQueueLimit)
	if err != nil || n < 0 {
		return unknown, false
	}
	return n, true
}

// bounds reads the ceiling and, on OpenBSD, the floor of listen(2).
func (sys *system) bounds() (ceiling, floor int, err error) {
	r, _ := ruleOf(runtime.GOOS)
	if r.knob == "" {
		return r.compiled, 0, nil
	}
	if ceiling, err = sys.sysctlCount(r.knob); errors.Is(err, unix.ENOENT) && r.formerKnob != "" {
		ceiling, err = sys.sysctlCount(r.formerKnob)
	}
	if err == nil && r.floor != "" {
		floor, err = sys.sysctlCount(r.floor)
	}
	return ceiling, floor, err
}

func (sys *system) sysctlCount(name string) (int, error) {
	n, err := sys.sysctl(name)
	if err != nil {
		return unknown, os.NewSyscallError("sysctl "+name, err)
	}
	return sysctlCount(n), nil
}
