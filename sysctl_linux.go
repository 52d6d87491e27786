package acceptq

import (
	"cmp"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sys"
)

// readSettings sets the fields of s that Linux reports, except the ceiling. It returns the
// first error, after it has tried to read them all.
func readSettings(k *sys.Calls, s *System) (err error) {
	setting := func(name string) int {
		n, e := k.ReadIPv4Setting(name)
		err = cmp.Or(err, noDescriptor(e))
		return n
	}
	s.SYNBacklog = setting("tcp_max_syn_backlog")
	s.SYNCookies = setting("tcp_syncookies")
	s.AbortOnOverflow = setting("tcp_abort_on_overflow")
	s.MigrateRequests = setting("tcp_migrate_req")

	counter, e := k.ReadTCPCounters()
	s.ListenOverflows = counter("ListenOverflows")
	s.ListenDrops = counter("ListenDrops")
	s.ReqQFullDrop = counter("TCPReqQFullDrop")
	s.ReqQFullDoCookies = counter("TCPReqQFullDoCookies")
	return cmp.Or(err, e)
}

// readBounds reads the ceiling. /proc/sys/net shows the network namespace of the calling
// thread, in which its sockets are made too.
func readBounds(k *sys.Calls) (ceiling, floor int, err error) {
	const name = "/proc/sys/net/core/somaxconn"
	text, err := k.ReadFile(name)
	if err != nil {
		return unknown, 0, err
	}
	if ceiling, err = sys.ParseNumber(string(text)); err != nil {
		return unknown, 0, fmt.Errorf("%s: %w", name, err)
	}
	return ceiling, 0, nil
}

// readBoundsOf reads the ceiling that applies to the listening socket fd.
func readBoundsOf(k *sys.Calls, fd int) (ceiling, floor int, err error) {
	ns, _, err := netns.Of(k, fd)
	if err != nil {
		return unknown, 0, err
	}
	defer ns.Close()
	ceiling = unknown
	err = ns.In(func() (err error) {
		ceiling, floor, err = readBounds(k)
		return err
	})
	return ceiling, floor, err
}

// ceilingPlace returns where the ceiling must be changed, for a sentence. It is "" on a
// plain machine whose user may change it, and if the place cannot be told.
func ceilingPlace() string {
	const ceiling = "/proc/sys/net/core/somaxconn"
	if unix.Access(ceiling, unix.F_OK) != nil {
		return ""
	}
	// The kernel shows this setting only in the first network namespace (net_core_table in
	// net/core/sysctl_net_core.c). A container has another one, and the host's ceiling does
	// not apply to it.
	contained := errors.Is(unix.Access("/proc/sys/net/core/netdev_budget", unix.F_OK), unix.ENOENT)
	writable := unix.Faccessat(unix.AT_FDCWD, ceiling, unix.W_OK, unix.AT_EACCESS) == nil
	switch {
	case contained && writable:
		return " in this network namespace (docs/ceiling.md)"
	case contained:
		return " for this network namespace, where the program itself may not do it (docs/ceiling.md)"
	case !writable:
		return " as root (docs/ceiling.md)"
	}
	return ""
}

// noDescriptor returns err if it means that no file descriptor is left, and nil otherwise.
func noDescriptor(err error) error {
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return err
	}
	return nil
}
