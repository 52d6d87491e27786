package netns

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// A socket belongs to the network namespace of the thread that made it. Settings and
// tables of the kernel are those of the thread that reads them. A program may call the
// methods of a Listener from any thread, so the two namespaces are compared first.

// A Namespace is the network namespace of a socket. If file is nil, it is that of the
// calling thread.
type Namespace struct{ File *os.File }

// Close closes the file of the namespace.
func (ns Namespace) Close() {
	if ns.File != nil {
		ns.File.Close()
	}
}

// Of returns the network namespace of the socket fd. If that is not the calling
// thread's namespace, it requires CAP_NET_ADMIN in it (SIOCGSKNS).
//
// Kernels before 5.14 do not have SO_NETNS_COOKIE. On these compared is false, and the
// socket is assumed to be in the calling thread's namespace.
func Of(k *sys.Calls, fd int) (ns Namespace, compared bool, err error) {
	cookie, err := CookieOf(k, fd)
	if err != nil {
		return Namespace{}, false, nil
	}
	probe, err := k.UnixSocket()
	if err != nil {
		return Namespace{}, false, os.NewSyscallError("socket", err)
	}
	own, err := CookieOf(k, probe)
	unix.Close(probe)
	if err != nil {
		return Namespace{}, false, os.NewSyscallError("getsockopt", err)
	}
	if own == cookie {
		return Namespace{}, true, nil
	}
	file, err := k.NamespaceFile(fd)
	if err != nil {
		return Namespace{}, true, fmt.Errorf("the socket is in another network namespace: %w", os.NewSyscallError("ioctl", err))
	}
	return Namespace{file}, true, nil
}

// NamespaceOfSocket returns the network namespace of a socket, see Of.
func NamespaceOfSocket(k *sys.Calls, raw syscall.RawConn) (ns Namespace, err error) {
	cerr := raw.Control(func(fd uintptr) { ns, _, err = Of(k, int(fd)) })
	return ns, cmp.Or(sys.Cause(cerr), err)
}

// CookieOf returns the number of the network namespace of fd. The kernel never uses
// a number twice.
func CookieOf(k *sys.Calls, fd int) (uint64, error) {
	var p [8]byte
	n, err := k.Getsockopt(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE, p[:])
	if err == nil && n != len(p) {
		err = unix.EBADMSG
	}
	return binary.NativeEndian.Uint64(p[:]), err
}

// In calls f on a thread in the namespace ns. If that is not the calling thread's
// namespace, it requires CAP_SYS_ADMIN (setns(2)).
func (ns Namespace) In(f func() error) error {
	if ns.File == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- ns.visit(f) }()
	return <-done
}

// visit must run in its own goroutine. If the thread cannot return to its namespace, it
// stays locked, and the runtime ends it with the goroutine. So no other goroutine runs in
// the other namespace.
func (ns Namespace) visit(f func() error) error {
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
	if err := unix.Setns(int(ns.File.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fail("setns", err)
	}
	err = f()
	if unix.Setns(own, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}
