package observe

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// processes returns the holders of the sockets whose inodes are the keys of wanted. It uses the
// values to remember the last holder.
func processes(ctx context.Context, wanted map[uint64]int) (holders map[uint64][]Process, complete bool, err error) {
	holders = make(map[uint64][]Process, len(wanted))
	fail := func(err error) (map[uint64][]Process, bool, error) {
		return nil, false, fmt.Errorf("acceptq: processes: %w", err)
	}
	s := scan{complete: true}
	// Process 1 is in every PID namespace. If it is missing, /proc hides the processes of
	// other users (hidepid=2, proc(5)).
	if err := unix.Access("/proc/1", unix.F_OK); err != nil {
		s.complete = false
	}
	proc, err := openDirectory(unix.AT_FDCWD, "/proc")
	if err != nil {
		return fail(os.NewSyscallError("open /proc", err))
	}
	defer unix.Close(proc)
	pids, err := s.numbers(proc, nil)
	if err != nil {
		return fail(err)
	}
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		if err := s.read(proc, pid, wanted); err != nil {
			return fail(err)
		}
		if len(s.held) == 0 {
			continue
		}
		// Most sockets have one holder, so those of a process share this slice.
		one := []Process{{PID: pid, Name: name(pid)}}
		for _, inode := range s.held {
			if holders[inode] == nil {
				holders[inode] = one[:1:1]
			} else {
				holders[inode] = append(holders[inode], one[0])
			}
		}
	}
	for _, all := range holders {
		slices.SortFunc(all, func(a, b Process) int { return cmp.Compare(a.PID, b.PID) })
	}
	return holders, s.complete, nil
}

// A scan has the buffers and the result of reading one process after the other.
type scan struct {
	held        []uint64 // the wanted sockets of this process, each once
	complete    bool     // no process has been refused
	descriptors []int
	path        [32]byte
	link        [64]byte
	buffer      [1 << 14]byte // for getdents64(2)
}

// read sets held to the wanted sockets that a process holds. A process that ends meanwhile
// holds none.
func (s *scan) read(proc, pid int, wanted map[uint64]int) error {
	s.held = s.held[:0]
	dir, err := openDirectory(proc, strconv.Itoa(pid)+"/fd")
	if err != nil {
		return s.refused("open", err)
	}
	defer unix.Close(dir)
	if s.descriptors, err = s.numbers(dir, s.descriptors[:0]); err != nil {
		return s.refused("getdents64", err)
	}
	for _, fd := range s.descriptors {
		n, err := s.readLink(dir, fd)
		switch {
		case err == unix.ENOENT: // closed meanwhile
			continue
		case err != 0:
			return s.refused("readlinkat", err)
		}
		if inode, ok := socketLink(s.link[:n]); ok {
			// A process can hold a socket by several descriptors.
			if last, is := wanted[inode]; is && last != pid {
				wanted[inode] = pid
				s.held = append(s.held, inode)
			}
		}
	}
	return nil
}

// readLink reads the link of a descriptor into s.link. A machine can have a million
// descriptors, so this makes the system call without what unix.Readlinkat allocates. A link
// of /proc never blocks.
func (s *scan) readLink(dir, fd int) (n int, err unix.Errno) {
	path := append(strconv.AppendInt(s.path[:0], int64(fd), 10), 0)
	r, _, err := unix.RawSyscall6(unix.SYS_READLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&path[0])),
		uintptr(unsafe.Pointer(&s.link[0])), uintptr(len(s.link)), 0, 0)
	return int(r), err
}

// refused notes that a process could not be read. It returns an error only if that is not
// the fault of the process.
func (s *scan) refused(call string, err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		s.complete = false
		return nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH): // the process has ended
		return nil
	}
	return os.NewSyscallError(call, err)
}

func openDirectory(at int, path string) (int, error) {
	return unix.Openat(at, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// numbers appends the entries of a directory whose names are numbers: processes or
// descriptors.
func (s *scan) numbers(dir int, all []int) ([]int, error) {
	for {
		n, err := unix.Getdents(dir, s.buffer[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return all, err
		}
		all = directoryNumbers(s.buffer[:n], all)
	}
}

// directoryNumbers appends the names in an answer of getdents64(2) that are numbers. An
// entry is a struct linux_dirent64: 16 bytes, a u16 d_reclen, a byte and the name, which ends
// with a 0.
func directoryNumbers(p []byte, all []int) []int {
	const length, name = 16, 19
	for len(p) >= name {
		size := int(binary.NativeEndian.Uint16(p[length:]))
		if size < name || size > len(p) {
			break
		}
		text, _, _ := bytes.Cut(p[name:size], []byte{0})
		if n, ok := digits(text); ok && n <= 1<<31-1 {
			all = append(all, int(n))
		}
		p = p[size:]
	}
	return all
}

// socketLink returns the inode of a link in /proc/PID/fd, if it is a socket:
// "socket:[4711]".
func socketLink(link []byte) (inode uint64, ok bool) {
	number, ok := bytes.CutPrefix(link, []byte("socket:["))
	if !ok || len(number) == 0 || number[len(number)-1] != ']' {
		return 0, false
	}
	return digits(number[:len(number)-1])
}

// digits parses a decimal number. Unlike strconv, it does not allocate, since most links and
// names are none.
func digits(text []byte) (n uint64, ok bool) {
	if len(text) == 0 || len(text) > 19 {
		return 0, false
	}
	for _, c := range text {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + uint64(c-'0')
	}
	return n, true
}

// name returns the name of a process. It is empty if the process has ended.
func name(pid int) string {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(strings.TrimSuffix(string(text), "\n"), "?")
}
