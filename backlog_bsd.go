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
	sysctl           func(name string) (uint32, error)
	readable         func(fd int) (int, error)
	setsockoptString func(fd, level, name int, value string) error
}

var realKernel = kernel{
	sysctl:           sysctlUnsigned,
	readable:         readable,
	setsockoptString: unix.SetsockoptString,
}

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

// Options of a listening socket on FreeBSD, from sys/socket.h; x/sys has them
// for FreeBSD only.
const (
	soListenQueueLimit      = 0x1011 // SO_LISTENQLIMIT
	soListenQueueLen        = 0x1012 // SO_LISTENQLEN
	soListenIncompleteQueue = 0x1013 // SO_LISTENINCQLEN
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

// stats reads the accept queue of fd. One whose transport is known was looked at
// when its Listener was made. The buffer is Linux's need.
func (sys *system) stats(fd int, tr transport, _ []byte) (Stats, error) {
	if tr == transportUnknown {
		if err := sys.mustListen(fd); err != nil {
			return noStats, err
		}
	}
	s := noStats
	if runtime.GOOS != "freebsd" {
		var err error
		s.Queued, err = sys.queueLength(fd)
		return s, err
	}
	for _, q := range []struct {
		name int
		to   *int
	}{
		{soListenQueueLen, &s.Queued},
		{soListenIncompleteQueue, &s.Incomplete},
		{soListenQueueLimit, &s.Limit},
	} {
		n, err := sys.getsockoptInt(fd, unix.SOL_SOCKET, q.name)
		if err != nil {
			return noStats, os.NewSyscallError("getsockopt", err)
		}
		*q.to = n
	}
	r, _ := ruleOf(runtime.GOOS)
	s.Capacity = r.capacity(s.Limit)
	return s, nil
}

// queueLength is the length of the accept queue of fd as kqueue(2) tells it; -1 if
// it is too long for that. DragonFly alone has a bound (filt_solisten in
// kern/uipc_socket.c); a kernel that does not know its name is from before it.
func (sys *system) queueLength(fd int) (int, error) {
	n, err := sys.readable(fd)
	if err != nil || n == 0 || runtime.GOOS != "dragonfly" {
		return n, err
	}
	most, err := sys.readSysctl(availKnob)
	switch {
	case errors.Is(err, unix.ENOENT):
		return n, nil
	case err != nil:
		return unknown, nil
	}
	return cappedLength(n, most), nil
}

// readable asks a kernel queue of its own, so that the poller of the listener is
// not disturbed: EVFILT_READ on a listening socket comes with the length of the
// accept queue, and does not come while that is empty (kqueue(2)).
func readable(fd int) (int, error) {
	kq, err := unix.Kqueue()
	if err != nil {
		return unknown, os.NewSyscallError("kqueue", err)
	}
	defer unix.Close(kq)
	var change, event [1]unix.Kevent_t
	unix.SetKevent(&change[0], fd, unix.EVFILT_READ, unix.EV_ADD)
	n, err := unix.Kevent(kq, change[:], event[:], new(unix.Timespec))
	if err != nil {
		return unknown, os.NewSyscallError("kevent", err)
	}
	if n == 0 {
		return 0, nil
	}
	if event[0].Flags&unix.EV_ERROR != 0 { // the change was refused, and why
		return unknown, os.NewSyscallError("kevent", unix.Errno(event[0].Data))
	}
	return int(event[0].Data), nil
}

// transportOf: there is no MPTCP below net's listeners here.
func (sys *system) transportOf(int) transport { return plainTCP }

// describe fills in what FreeBSD says of listening besides the ceiling. Its
// counters are in a structure whose layout moves between releases.
func (sys *system) describe(s *System) {
	if runtime.GOOS != "freebsd" {
		return
	}
	s.SYNCookies, _ = sys.readSysctl(cookiesKnob)
	s.AbortOnOverflow, _ = sys.readSysctl("net.inet.tcp.syncache.rst_on_sock_fail")
}
