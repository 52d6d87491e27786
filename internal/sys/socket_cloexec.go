//go:build dragonfly || freebsd || linux || netbsd || openbsd

package sys

import (
	"golang.org/x/sys/unix"
)

// streamSocket makes a TCP socket that is close-on-exec from the start.
func streamSocket(domain int) (int, error) {
	return unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}
