//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// readStatsOf reads the accept queue of fd. If tr is known, fd was checked when its Listener was
// made. Only Linux needs the buffer.
func readStatsOf(k *sys.Calls, fd int, tr transport, _ []byte) (Stats, error) {
	if tr == transportUnknown {
		if err := mustListen(k, fd); err != nil {
			return noStats, err
		}
	}
	s := noStats
	if runtime.GOOS != "freebsd" {
		var err error
		s.Queued, err = queueLength(k, fd)
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
		n, err := k.GetInt(fd, unix.SOL_SOCKET, q.name)
		if err != nil {
			return noStats, err
		}
		*q.to = n
	}
	r := hostRule()
	s.Capacity = r.capacity(s.Limit)
	return s, nil
}

// queueLength returns the length of the accept queue of fd, as kqueue(2) reports it. It
// returns -1 if the queue is too long for that. Only DragonFly has a maximum
// (filt_solisten in kern/uipc_socket.c). Older DragonFly kernels have neither the maximum
// nor its sysctl.
func queueLength(k *sys.Calls, fd int) (int, error) {
	n, err := k.Readable(fd)
	if err != nil || n == 0 || runtime.GOOS != "dragonfly" {
		return n, err
	}
	most, err := k.ReadSysctl(availKnob)
	switch {
	case errors.Is(err, unix.ENOENT):
		return n, nil
	case err != nil:
		return unknown, nil
	}
	return cappedLength(n, most), nil
}

// transportOf returns plainTCP, because package net does not use MPTCP on these systems.
func transportOf(k *sys.Calls, _ int) transport { return plainTCP }
