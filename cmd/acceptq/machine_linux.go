package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sockdiag"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// windowSize returns the columns and rows of a terminal. The columns are 0 if f is not one. The
// rows are 0 if they are unknown. A serial console does not know its size.
func windowSize(f *os.File) (columns, rows int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	switch {
	case err != nil:
		return 0, 0
	case size.Col == 0:
		return 80, 0
	}
	return max(int(size.Col), 20), int(size.Row)
}

// otherPlaces returns the network namespaces of this machine except that of the command: those
// with a name in /run/netns and those of processes. It does not find one that only a thread, a
// descriptor or a mount elsewhere holds. unread are sentences about what is missing.
func otherPlaces() (places []place, unread []string, err error) {
	own, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return nil, nil, err
	}
	seen := []fs.FileInfo{own}
	add := func(path string, name func() string) error {
		found, err := os.Stat(path)
		if err != nil {
			return err
		}
		for _, s := range seen {
			if os.SameFile(s, found) {
				return nil
			}
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		seen = append(seen, found)
		id := found.Sys().(*syscall.Stat_t).Ino
		places = append(places, place{id: id, name: name(), enter: "nsenter --net=" + printable(path) + " ", in: netns.Namespace{File: f}.In, close: func() { f.Close() }})
		return nil
	}
	names, _ := filepath.Glob("/run/netns/*")
	for _, path := range names {
		// A name without its mount is an empty file.
		var kind unix.Statfs_t
		if unix.Statfs(path, &kind) == nil && kind.Type == unix.NSFS_MAGIC {
			name := printable(filepath.Base(path))
			if err := add(path, func() string { return name }); err != nil {
				unread = append(unread, fmt.Sprintf("The network namespace %s cannot be read: %v.", name, err))
			}
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, nil, err
	}
	refused := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		err = add("/proc/"+e.Name()+"/ns/net", func() string { return placeOfProcess(pid) })
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // or the process has ended
		case errors.Is(err, fs.ErrPermission):
			refused++
		default:
			unread = append(unread, fmt.Sprintf("The network namespace of the process %d cannot be read: %v.", pid, err))
		}
	}
	// Process 1 is in every PID namespace, unless /proc hides the processes of other users.
	if _, err := os.Stat("/proc/1"); err != nil {
		unread = append(unread, fmt.Sprintf("/proc hides processes. Their network namespaces cannot be read %s.", unreadable()))
	}
	if refused > 0 {
		unread = append(unread, fmt.Sprintf("The network namespaces of %s cannot be read %s.",
			count(refused, "process", "processes"), unreadable()))
	}
	return places, unread, nil
}

// placeOfProcess names a network namespace after a process in it: its container, or itself.
func placeOfProcess(pid int) string {
	directory := "/proc/" + strconv.Itoa(pid)
	if text, err := os.ReadFile(directory + "/cgroup"); err == nil {
		if id := containerOf(string(text)); id != "" {
			return id
		}
	}
	comm, _ := os.ReadFile(directory + "/comm")
	return fmt.Sprintf("%s %d", printable(strings.TrimSpace(string(comm))), pid)
}

// everyState selects the states up to bound, TCP_BOUND_INACTIVE, which the kernel lists since
// Linux 6.8: the socket is bound and neither listens nor connects.
const everyState = 1<<(bound+1) - 1

// socketsOn lists the sockets with a local port, except the listeners.
func socketsOn(ctx context.Context, port uint16) (all []connection, err error) {
	seen := make(map[uint64]bool)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		r := sockdiag.Request{Family: family, Port: port, States: everyState &^ (1 << tcpinfo.Listen)}
		_, err := sockdiag.Dump(&sys.Real, ctx, r, func(r sockdiag.Row) bool {
			if !seen[r.Cookie] { // the kernel can list a socket twice while its table changes
				seen[r.Cookie] = true
				c := connection{local: r.Local, remote: r.Client, state: r.State, inode: uint64(r.Inode)}
				if c.state == closed && c.remote.Port() == 0 { // the kernel lists a bound socket so
					c.state = bound
				}
				all = append(all, c)
			}
			return false
		})
		if err != nil {
			return nil, os.NewSyscallError("sock_diag", err)
		}
	}
	return all, nil
}

// dialPorts returns the ports that the kernel gives to a program that dials, and the list of
// those that are reserved. The ports are 0 if the two cannot be read.
func dialPorts() (low, high int, reserved string) {
	ports, err1 := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	list, err2 := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	if err1 != nil || err2 != nil {
		return 0, 0, ""
	}
	low, high = parseRange(string(ports))
	return low, high, strings.TrimSpace(string(list))
}

// isStopped reports whether a signal such as SIGSTOP has stopped a process.
func isStopped(pid int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && processState(text) == 'T'
}
