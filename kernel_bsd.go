//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import "golang.org/x/sys/unix"

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
