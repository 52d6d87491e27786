package acceptq

import (
	"fmt"

	"github.com/acceptq/acceptq/internal/netns"
	"github.com/acceptq/acceptq/internal/sys"
)

// readSettings sets the fields of s that Linux reports, except the ceiling.
func readSettings(k *sys.Calls, s *System) {
	s.SYNBacklog = k.IPv4Setting("tcp_max_syn_backlog")
	s.SYNCookies = k.IPv4Setting("tcp_syncookies")
	s.AbortOnOverflow = k.IPv4Setting("tcp_abort_on_overflow")
	s.MigrateRequests = k.IPv4Setting("tcp_migrate_req")

	counter := k.TCPCounters()
	s.ListenOverflows = counter("ListenOverflows")
	s.ListenDrops = counter("ListenDrops")
	s.ReqQFullDrop = counter("TCPReqQFullDrop")
	s.ReqQFullDoCookies = counter("TCPReqQFullDoCookies")
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
