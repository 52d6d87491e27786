//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import "golang.org/x/sys/unix"

// openDescriptors counts the open descriptors of this process. A leaked one is
// low: the kernel gives out the lowest that is free.
func openDescriptors() (n int) {
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}
