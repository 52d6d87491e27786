//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

import "golang.org/x/sys/unix"

// ownCalls are the calls that the package makes on the BSDs and macOS only.
type ownCalls struct {
	sysctl           func(name string) (uint32, error)
	readable         func(fd int) (int, error)
	setsockoptString func(fd, level, name int, value string) error
}

var realOwnCalls = ownCalls{
	sysctl:           sysctlUnsigned,
	readable:         readable,
	setsockoptString: unix.SetsockoptString,
}
