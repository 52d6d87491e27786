//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Options of a listening socket on FreeBSD, from sys/socket.h; x/sys has them
// for FreeBSD only.
const (
	soListenQueueLimit      = 0x1011 // SO_LISTENQLIMIT
	soListenQueueLen        = 0x1012 // SO_LISTENQLEN
	soListenIncompleteQueue = 0x1013 // SO_LISTENINCQLEN
)

// limit reads the limit of the listening socket fd. FreeBSD alone has an option
// that tells it (getsockopt(2)).
func (k *kernel) limit(fd int) (limit int, ok bool) {
	if runtime.GOOS != "freebsd" {
		return unknown, false
	}
	n, err := k.getInt(fd, unix.SOL_SOCKET, soListenQueueLimit)
	if err != nil || n < 0 {
		return unknown, false
	}
	return n, true
}

// stats reads the accept queue of fd. One whose transport is known was looked at
// when its Listener was made. The buffer is Linux's need.
func (k *kernel) stats(fd int, tr transport, _ []byte) (Stats, error) {
	if tr == transportUnknown {
		if err := k.mustListen(fd); err != nil {
			return noStats, err
		}
	}
	s := noStats
	if runtime.GOOS != "freebsd" {
		var err error
		s.Queued, err = k.queueLength(fd)
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
		n, err := k.getInt(fd, unix.SOL_SOCKET, q.name)
		if err != nil {
			return noStats, err
		}
		*q.to = n
	}
	r := hostRule()
	s.Capacity = r.capacity(s.Limit)
	return s, nil
}

// queueLength is the length of the accept queue of fd as kqueue(2) tells it; -1 if
// it is too long for that. DragonFly alone has a bound (filt_solisten in
// kern/uipc_socket.c); a kernel that does not know its name is from before it.
func (k *kernel) queueLength(fd int) (int, error) {
	n, err := k.readable(fd)
	if err != nil || n == 0 || runtime.GOOS != "dragonfly" {
		return n, err
	}
	most, err := k.readSysctl(availKnob)
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
func (k *kernel) transportOf(int) transport { return plainTCP }
