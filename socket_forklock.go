//go:build darwin

package acceptq

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// streamSocket makes a TCP socket that is close-on-exec before any child can be
// forked: macOS has no SOCK_CLOEXEC.
func streamSocket(domain int) (int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := unix.Socket(domain, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	return fd, err
}
