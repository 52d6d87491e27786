//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import (
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// Options of a listening socket on FreeBSD, from sys/socket.h. x/sys defines them for
// FreeBSD only.
const (
	soListenQueueLimit      = 0x1011 // SO_LISTENQLIMIT
	soListenQueueLen        = 0x1012 // SO_LISTENQLEN
	soListenIncompleteQueue = 0x1013 // SO_LISTENINCQLEN
)

// readLimit reads the limit of the listening socket fd. Only FreeBSD has an option for that,
// see getsockopt(2).
func readLimit(k *sys.Calls, fd int) (limit int, ok bool) {
	if runtime.GOOS != "freebsd" {
		return unknown, false
	}
	n, err := k.GetInt(fd, unix.SOL_SOCKET, soListenQueueLimit)
	if err != nil || n < 0 {
		return unknown, false
	}
	return n, true
}

const availKnob = "kern.ipc.soavailconn" // DragonFly: the maximum that kqueue(2) reports
