//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// Readable returns the length of the accept queue of fd. The EVFILT_READ event of a
// listening socket contains it. There is no event while the queue is empty (kqueue(2)).
// readable opens a kqueue, so that the poller of the listener is not affected.
func Readable(fd int) (int, error) {
	kq, err := unix.Kqueue()
	if err != nil {
		return Unknown, os.NewSyscallError("kqueue", err)
	}
	defer unix.Close(kq)
	var change, event [1]unix.Kevent_t
	unix.SetKevent(&change[0], fd, unix.EVFILT_READ, unix.EV_ADD)
	n, err := unix.Kevent(kq, change[:], event[:], new(unix.Timespec))
	if err != nil {
		return Unknown, os.NewSyscallError("kevent", err)
	}
	if n == 0 {
		return 0, nil
	}
	if event[0].Flags&unix.EV_ERROR != 0 { // the kernel refused the change; Data is the errno
		return Unknown, os.NewSyscallError("kevent", unix.Errno(event[0].Data))
	}
	return int(event[0].Data), nil
}

// ownCalls are the calls that the package makes on the BSDs and macOS only.
type ownCalls struct {
	Sysctl           func(name string) (uint32, error)
	Readable         func(fd int) (int, error)
	SetsockoptString func(fd, level, name int, value string) error
}

// RealOwnCalls are the own calls of the running kernel.
var RealOwnCalls = ownCalls{
	Sysctl:           sysctlUnsigned,
	Readable:         Readable,
	SetsockoptString: unix.SetsockoptString,
}

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

// ReadSysctl reads a number of sysctl(3) by its name.
func (k *Calls) ReadSysctl(name string) (int, error) {
	n, err := k.Sysctl(name)
	if err != nil {
		return Unknown, os.NewSyscallError("sysctl "+name, err)
	}
	return sysctlCount(n), nil
}
