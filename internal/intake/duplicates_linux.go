package intake

import (
	"cmp"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// duplicated reports for each listener whether this process has a second descriptor of
// its socket. If that cannot be determined, the result is true.
func duplicated(listeners []*Intake) map[*Intake]bool {
	counts, err := listeners[0].Calls.Descriptors()
	found := make(map[*Intake]bool)
	for _, l := range listeners {
		inode, statErr := inodeOf(l)
		if errors.Is(statErr, net.ErrClosed) {
			continue // a closed socket has nothing to restore
		}
		found[l] = err != nil || statErr != nil || counts[inode] > 1
	}
	return found
}

// Duplicates calls f and reports whether f has left a duplicate of the descriptor fd. The
// kernel assigns the lowest free number to a new descriptor. So duplicates compares the
// sockets from the lowest number that was free before f to the one that is free afterwards.
//
// It does not find a duplicate at a number of the caller's choice, as dup3(2) makes it, or
// at a number that another goroutine freed during f. It finds nothing if the process has no
// descriptor left. The check at the end of a drain finds these, unless they are closed.
func Duplicates(fd int, f func()) bool {
	before, err := lowestFree()
	f()
	if err != nil {
		return false
	}
	after, err := lowestFree()
	if err != nil { // f, or another goroutine, has taken the last ones
		after = before + 1
	}
	var own, s unix.Stat_t
	if unix.Fstat(fd, &own) != nil {
		return false
	}
	for n := before; n < after; n++ {
		if n != fd && unix.Fstat(n, &s) == nil && s.Dev == own.Dev && s.Ino == own.Ino {
			return true
		}
	}
	return false
}

// lowestFree returns the lowest number that no descriptor of this process has.
func lowestFree() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err == nil {
		unix.Close(fd)
	}
	return fd, err
}

// inodeOf returns the inode number of the socket of l, which identifies it.
func inodeOf(l *Intake) (uint64, error) {
	var s unix.Stat_t
	var err error
	cerr := l.Raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &s) })
	return s.Ino, cmp.Or(sys.Cause(cerr), os.NewSyscallError("fstat", err))
}
