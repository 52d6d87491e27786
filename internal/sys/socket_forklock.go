//go:build darwin

package sys

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// streamSocket makes a TCP socket and sets close-on-exec before the process can fork a
// child, because macOS has no SOCK_CLOEXEC.
func streamSocket(domain int) (int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := unix.Socket(domain, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	return fd, err
}
