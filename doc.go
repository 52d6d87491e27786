// Package acceptq listens on TCP with an explicit backlog and reports the accept
// queue that the kernel granted.
//
// [net.Listen] uses the system-wide ceiling as its backlog and reads that ceiling once
// per process. It does not report what the kernel granted. With this package the caller
// chooses the backlog, and the listener reports the result:
//
//	ln, err := acceptq.ListenTCP(":8080", acceptq.WithBacklog(4096))
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Print(ln.Backlog()) // backlog: asked 4096, granted 128, holds 129; net.core.somaxconn is 128: ...
//	log.Fatal(http.Serve(ln, nil))
//
// [Listener.Stats] reads how full the queue is. [Listener.SetBacklog] changes its
// limit while the server is running. [Wrap] adds these methods to a listener that
// package net, systemd or another library made. [ListenTCPShards] gives one address
// several queues.
//
// # Terms
//
//   - Backlog: the number passed to listen(2).
//   - Ceiling: the system-wide maximum, such as net.core.somaxconn.
//   - Limit: what the kernel stored on this socket after clamping.
//   - Effective backlog: the length to which the accept queue may grow.
//   - Capacity: how many finished handshakes fit before the kernel refuses the next one.
//   - Accept queue: the finished handshakes that wait for Accept.
//   - SYN queue: the unfinished handshakes.
//
// # Stopping a server
//
// When a listening socket is closed, the kernel resets every connection that waits in
// its queue and every handshake that finishes afterwards. [net/http.Server.Shutdown]
// closes the socket first.
//
// Package [github.com/acceptq/acceptq/graceful] serves a [net/http.Server] and stops it
// without losing a request. For other servers the steps are:
//
//  1. Call [Listener.Drain] while the server continues to accept.
//  2. Wait until the server has sent something on every connection.
//  3. Shut the server down, which closes the listener.
//
// The page [docs/draining.md] describes the kinds of restart, Kubernetes, gRPC and other
// servers.
//
// # Draining
//
// [Listener.Drain] checks the accept queue every few milliseconds. It ends when the
// handshakes that began before the drain are finished and Accept has returned their
// connections. How it keeps new clients out in the meantime depends on the system:
//
//   - Linux with CAP_NET_ADMIN: a socket filter drops SYNs and passes all other packets.
//     Kernels released before mid-2026 allow the filter without the capability.
//   - Linux without the filter: a minimum TTL of 255 (IP_MINTTL, IPV6_MINHOPCOUNT) drops
//     the packets of most clients. A client that sends with TTL 255 still gets in if no
//     router is between it and the server. Data sent before Accept is dropped. It arrives
//     when the client sends it again.
//   - Other systems, and MPTCP sockets: the kernel has no way to keep clients out. As
//     soon as the queue is empty, the drain ends with [ErrStillOpen].
//
// Drain does not replace settings of the caller. If the socket already has a filter, Drain
// uses the minimum TTL. If the socket already has a minimum TTL n (RFC 5082) of at most
// 126, the drain sets 255 - n, and accepted connections have n again. Above 126 Drain uses
// only the filter. If Drain can use neither, it ends with ErrStillOpen.
//
// In-flight handshakes. Linux lists them (sock_diag(7)). The drain waits for the
// handshakes that it finds when it begins. It waits for at most 3 s, because some clients
// never finish. The 3 s start again while an accept queue is full. The drain waits for the
// whole 3 s if handshakes may be missing from the list:
//   - The kernel has ever sent a SYN cookie in this network namespace (SyncookiesSent in
//     /proc/net/netstat), or may have. It keeps no state for a handshake with a cookie.
//   - The listener gets clients of other local ports: it has IP_TRANSPARENT (ip(7)), or
//     Accept has returned such a client, which a BPF program of type sk_lookup sent.
//   - The socket is in another network namespace, and the process does not have
//     CAP_NET_ADMIN and CAP_SYS_ADMIN there.
//
// The drain also waits for at most 3 s for connections that an accept filter holds back.
// NetBSD and DragonFly do not report their number, so there a drain of a listener with a
// filter takes the whole 3 s.
//
// Accept loops. A server may call Accept in several goroutines. When the queue is empty,
// the drain waits until each goroutine that got a connection has called Accept again. It
// waits for at most 1 s.
//
// Steering. On Linux, listeners made with [WithReusePort] can share an address. While
// some of them drain, a BPF program (SO_ATTACH_REUSEPORT_CBPF) directs new clients to the
// others, so that these clients do not wait for a retransmission. No system call reports
// which listeners serve. So the drain asks the kernel: it sends a SYN over the loopback
// interface to each listener of the group and sees which ones answer. A listener that
// drains, or whose queue is full, does not answer. The drain asks when it begins, when the
// group may have changed, and when the listener closes.
//
// Drains in several processes take turns. The next one waits until the former listener is
// closed, for at most 1 s and at most half of the time that its context has. Questions take
// turns too. If another process does not end its turn, a drain, a Close after a drain, Resume
// and a listener that joins go on without an answer after at most 1 s.
//
// There is no steering after [WithoutSteering], on a shared socket, and if no listener
// answers. The kernel then drops the SYNs that it assigns to a draining listener. No
// listener answers in these cases:
//   - The group gets no clients over the loopback interface. It is bound to a device, a
//     firewall blocks the interface, or the group has the wildcard address and another
//     listener has the loopback address with the same port.
//   - The other listeners have a higher minimum TTL than the draining one.
//   - The listeners send with a TTL of 255, and the process cannot attach socket filters.
//
// If the draining listener has a minimum TTL of 128 or more, the first question comes right
// after it has begun to drop SYNs, and clients that connect in between stall. A listener
// that joins asks with a TTL of 64. If the others demand more, it detaches the program of a
// drain, which asks again within 250 ms.
//
// A question makes no connection. A listener that answers has a half-open handshake for some
// microseconds. The kernel counts it in AttemptFails (/proc/net/snmp) and EmbryonicRsts
// (/proc/net/netstat). Each listener drops one packet, see [Stats]. While a process asks or
// drains, it holds a unix socket with an abstract name that begins with @acceptq/.
//
// Accepted connections. On Linux a connection made during a drain inherits the filter or
// the minimum TTL. Accept removes it.
//
// Shared sockets. A socket counts as shared after [Wrap] and [Listener.File], and on
// Linux if Drain or SyscallConn finds that this process has duplicated its descriptor.
// The other holder must not lose its clients. The drain therefore lets new clients in
// again when it ends, and returns ErrStillOpen. If a process is killed while it drains a
// shared socket, the filter or the minimum TTL stays in force. It is removed when
// another holder calls Wrap, Resume or File, or when a drain by another holder ends.
//
// Limitations:
//
//   - The minimum TTL drops the final ACKs of handshakes that use a SYN cookie. It is
//     therefore not used if the kernel answers every SYN with a cookie
//     (net.ipv4.tcp_syncookies is 2), or may do so.
//   - Close resets a connection that an accept filter or [WithDeferAccept] has held back
//     for the 3 s.
//   - If another holder of the socket accepts a connection that was made during the
//     drain, the connection keeps the filter or the minimum TTL. With the minimum TTL it
//     receives nothing.
//   - With net.ipv4.tcp_migrate_req the kernel moves what Close would reset to another
//     listener of the group. If that listener belongs to a program without this package, a
//     connection keeps the minimum TTL there and receives nothing.
//
// # Listeners on one address
//
// [WithReusePort] and [ListenShards] let several sockets listen on one address, and the
// kernel spreads new connections over them. It does not look at the queues: one queue
// can be full while another is empty.
//
// On Linux a drain attaches a BPF program to the group of the sockets. The program stays if
// the process is killed, and also after the last Close. A listener that joins the group
// therefore asks the kernel which listeners answer, see "Draining". If all do, it detaches
// any program. Otherwise it attaches a program that picks those that answer. The kernel does
// not report who attached a program, so the program of other code is replaced too.
// [WithoutSteering] prevents that.
//
// On FreeBSD before 15 a socket joins the group at bind(2) and not at listen(2). The
// kernel refuses the clients that it assigns to the socket between these two calls.
// [Listen] makes one right after the other.
//
// # Systems
//
// The source of the limit depends on the system:
//
//   - Linux and FreeBSD: it is read from the socket.
//   - macOS, NetBSD, OpenBSD and DragonFly: it is computed from the kernel's rule.
//   - Others (Windows, Solaris, illumos, AIX, Plan 9, js, wasip1): it is unknown, which
//     is -1 and never 0. Package net makes the socket, and the backlog is only a hint.
//
// The page [docs/systems.md] has the details.
//
// [docs/draining.md]: https://github.com/acceptq/acceptq/blob/main/docs/draining.md
// [docs/systems.md]: https://github.com/acceptq/acceptq/blob/main/docs/systems.md
package acceptq
