package acceptq

import (
	"cmp"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// duplicated reports for each listener whether this process has a second descriptor of
// its socket. If that cannot be determined, the result is true.
func duplicated(listeners []*intake) map[*intake]bool {
	counts, err := listeners[0].kernel.descriptors()
	found := make(map[*intake]bool)
	for _, l := range listeners {
		inode, statErr := l.inode()
		if errors.Is(statErr, net.ErrClosed) {
			continue // a closed socket has nothing to restore
		}
		found[l] = err != nil || statErr != nil || counts[inode] > 1
	}
	return found
}

// duplicates calls f and reports whether f has left a duplicate of the descriptor fd. The
// kernel assigns the lowest free number to a new descriptor. So duplicates compares the
// sockets from the lowest number that was free before f to the one that is free afterwards.
//
// It does not find a duplicate at a number of the caller's choice, as dup3(2) makes it, or
// at a number that another goroutine freed during f. It finds nothing if the process has no
// descriptor left. The check at the end of a drain finds these, unless they are closed.
func duplicates(fd int, f func()) bool {
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

// inode returns the inode number of the socket of l, which identifies it.
func (l *intake) inode() (uint64, error) {
	var s unix.Stat_t
	var err error
	cerr := l.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &s) })
	return s.Ino, cmp.Or(cause(cerr), os.NewSyscallError("fstat", err))
}

// descriptors returns how many descriptors of this process refer to each socket, by
// inode. It checks every descriptor of the process.
func descriptors() (counts map[uint64]int, err error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	counts = make(map[uint64]int)
	for _, name := range names {
		fd, err := parseSysctl(name)
		if err != nil {
			return nil, err
		}
		var s unix.Stat_t
		if unix.Fstat(fd, &s) == nil && s.Mode&unix.S_IFMT == unix.S_IFSOCK {
			counts[s.Ino]++
		}
	}
	return counts, nil
}
