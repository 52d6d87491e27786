//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Options of a listening socket on FreeBSD, from sys/socket.h. x/sys defines them for
// FreeBSD only.
const (
	soListenQueueLimit      = 0x1011 // SO_LISTENQLIMIT
	soListenQueueLen        = 0x1012 // SO_LISTENQLEN
	soListenIncompleteQueue = 0x1013 // SO_LISTENINCQLEN
)

// limit reads the limit of the listening socket fd. Only FreeBSD has an option for that,
// see getsockopt(2).
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

// stats reads the accept queue of fd. If tr is known, fd was checked when its Listener was
// made. Only Linux needs the buffer.
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

const availKnob = "kern.ipc.soavailconn" // DragonFly: the maximum that kqueue(2) reports

// queueLength returns the length of the accept queue of fd, as kqueue(2) reports it. It
// returns -1 if the queue is too long for that. Only DragonFly has a maximum
// (filt_solisten in kern/uipc_socket.c). Older DragonFly kernels have neither the maximum
// nor its sysctl.
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

// readable returns the length of the accept queue of fd. The EVFILT_READ event of a
// listening socket contains it. There is no event while the queue is empty (kqueue(2)).
// readable opens a kqueue, so that the poller of the listener is not affected.
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
	if event[0].Flags&unix.EV_ERROR != 0 { // the kernel refused the change; Data is the errno
		return unknown, os.NewSyscallError("kevent", unix.Errno(event[0].Data))
	}
	return int(event[0].Data), nil
}

// transportOf returns plainTCP, because package net does not use MPTCP on these systems.
func (k *kernel) transportOf(int) transport { return plainTCP }
