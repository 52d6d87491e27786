package acceptq

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// A socket belongs to the network namespace of the thread that made it. Settings and
// tables of the kernel are those of the thread that reads them. A program may call the
// methods of a Listener from any thread, so the two namespaces are compared first.

// A namespace is the network namespace of a socket. If file is nil, it is that of the
// calling thread.
type namespace struct{ file *os.File }

func (ns namespace) close() {
	if ns.file != nil {
		ns.file.Close()
	}
}

// namespaceOf returns the network namespace of the socket fd. If that is not the calling
// thread's namespace, it requires CAP_NET_ADMIN in it (SIOCGSKNS).
//
// Kernels before 5.14 do not have SO_NETNS_COOKIE. On these compared is false, and the
// socket is assumed to be in the calling thread's namespace.
func (k *kernel) namespaceOf(fd int) (ns namespace, compared bool, err error) {
	cookie, err := k.namespaceCookie(fd)
	if err != nil {
		return namespace{}, false, nil
	}
	probe, err := k.unixSocket()
	if err != nil {
		return namespace{}, false, os.NewSyscallError("socket", err)
	}
	own, err := k.namespaceCookie(probe)
	unix.Close(probe)
	if err != nil {
		return namespace{}, false, os.NewSyscallError("getsockopt", err)
	}
	if own == cookie {
		return namespace{}, true, nil
	}
	file, err := k.namespaceFile(fd)
	if err != nil {
		return namespace{}, true, fmt.Errorf("the socket is in another network namespace: %w", os.NewSyscallError("ioctl", err))
	}
	return namespace{file}, true, nil
}

// namespaceOfSocket returns the network namespace of a socket, see namespaceOf.
func (k *kernel) namespaceOfSocket(raw syscall.RawConn) (ns namespace, err error) {
	cerr := raw.Control(func(fd uintptr) { ns, _, err = k.namespaceOf(int(fd)) })
	return ns, cmp.Or(cause(cerr), err)
}

// namespaceCookie returns the number of the network namespace of fd. The kernel never uses
// a number twice.
func (k *kernel) namespaceCookie(fd int) (uint64, error) {
	var p [8]byte
	n, err := k.getsockopt(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE, p[:])
	if err == nil && n != len(p) {
		err = unix.EBADMSG
	}
	return binary.NativeEndian.Uint64(p[:]), err
}

// unixSocket makes a socket that is used only to read its namespace.
func unixSocket() (int, error) {
	return unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
}

// namespaceFile opens the network namespace of fd, see SIOCGSKNS in net/socket.c.
func namespaceFile(fd int) (*os.File, error) {
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(ns), "network namespace"), nil
}

// in calls f on a thread in the namespace ns. If that is not the calling thread's
// namespace, it requires CAP_SYS_ADMIN (setns(2)).
func (ns namespace) in(f func() error) error {
	if ns.file == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- ns.visit(f) }()
	return <-done
}

// visit must run in its own goroutine. If the thread cannot return to its namespace, it
// stays locked, and the runtime ends it with the goroutine. So no other goroutine runs in
// the other namespace.
func (ns namespace) visit(f func() error) error {
	fail := func(call string, err error) error {
		return fmt.Errorf("the socket is in another network namespace: %w", os.NewSyscallError(call, err))
	}
	runtime.LockOSThread()
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fail("open", err)
	}
	defer unix.Close(own)
	if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fail("setns", err)
	}
	err = f()
	if unix.Setns(own, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}
