package acceptq

import "fmt"

// readSettings sets the fields of s that Linux reports, except the ceiling.
func (k *kernel) readSettings(s *System) {
	s.SYNBacklog = k.ipv4Setting("tcp_max_syn_backlog")
	s.SYNCookies = k.ipv4Setting("tcp_syncookies")
	s.AbortOnOverflow = k.ipv4Setting("tcp_abort_on_overflow")
	s.MigrateRequests = k.ipv4Setting("tcp_migrate_req")

	counter := k.tcpCounters()
	s.ListenOverflows = counter("ListenOverflows")
	s.ListenDrops = counter("ListenDrops")
	s.ReqQFullDrop = counter("TCPReqQFullDrop")
	s.ReqQFullDoCookies = counter("TCPReqQFullDoCookies")
}

// ipv4Setting reads a number of net.ipv4 in the calling thread's network namespace.
func (k *kernel) ipv4Setting(name string) int {
	text, _ := k.readFile("/proc/sys/net/ipv4/" + name)
	n, _ := parseSysctl(string(text)) // unknown if the text is not a number
	return n
}

// tcpCounters reads the counters of the calling thread's network namespace. It returns a
// function that returns one of them. /proc/net is not used, because it shows the namespace
// of the main thread.
func (k *kernel) tcpCounters() func(column string) int64 {
	text, _ := k.readFile("/proc/thread-self/net/netstat")
	return func(column string) int64 { return netstatCounter(string(text), "TcpExt", column) }
}

// bounds reads the ceiling. /proc/sys/net shows the network namespace of the calling
// thread, in which its sockets are made too.
func (k *kernel) bounds() (ceiling, floor int, err error) {
	const name = "/proc/sys/net/core/somaxconn"
	text, err := k.readFile(name)
	if err != nil {
		return unknown, 0, err
	}
	if ceiling, err = parseSysctl(string(text)); err != nil {
		return unknown, 0, fmt.Errorf("%s: %w", name, err)
	}
	return ceiling, 0, nil
}

// boundsOf reads the ceiling that applies to the listening socket fd.
func (k *kernel) boundsOf(fd int) (ceiling, floor int, err error) {
	ns, _, err := k.namespaceOf(fd)
	if err != nil {
		return unknown, 0, err
	}
	defer ns.close()
	ceiling = unknown
	err = ns.in(func() (err error) {
		ceiling, floor, err = k.bounds()
		return err
	})
	return ceiling, floor, err
}
