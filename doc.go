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
//	log.Print(ln.Backlog()) // asked 4096, granted 128, holds 129; net.core.somaxconn is 128: ...
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
//     router is between it and the server. Data sent before Accept arrives with its
//     retransmission.
//   - Other systems, and MPTCP sockets: the kernel has no way to keep clients out. As
//     soon as the queue is empty, the drain ends with [ErrStillOpen].
//
// Drain does not replace settings of the caller. If the socket already has a filter, Drain
// uses the minimum TTL. If the socket already has a minimum TTL above 128, Drain uses only
// the filter. If Drain can use neither, it ends with ErrStillOpen.
//
// In-flight handshakes. Linux lists them (sock_diag(7)). The drain waits for the
// handshakes that it finds when it begins. It waits for at most 3 s, because some clients
// never finish. The 3 s start again while an accept queue is full. If the kernel does not
// list the handshakes, the drain waits for the whole 3 s. It also waits for at most 3 s for
// connections that an accept filter holds back. NetBSD and DragonFly do not report their
// number, so there a drain of a listener with a filter takes the whole 3 s.
//
// Accept loops. A server may call Accept in several goroutines. When the queue is empty,
// the drain waits until each goroutine that got a connection has called Accept again. It
// waits for at most 1 s.
//
// Steering. On Linux, listeners made with [WithReusePort] can share an address. While
// one of them drains, a BPF program (SO_ATTACH_REUSEPORT_CBPF) directs new clients to
// the others, so that these clients do not wait for a retransmission. The program is not
// used after [WithoutSteering] or on a shared socket. The kernel then drops their SYNs.
//
// Accepted connections. On Linux a connection made during a drain inherits the filter or
// the minimum TTL. Accept removes it.
//
// Shared sockets. A socket counts as shared after [Wrap] and [Listener.File], and on
// Linux if Drain or SyscallConn finds that this process has duplicated its descriptor.
// The other holder must not lose its clients. The drain therefore lets new clients in
// again when it ends, and returns ErrStillOpen. If a process is killed while it drains a
// shared socket, the filter or the minimum TTL stays in force. It is removed when
// another holder calls Wrap or when a drain by another holder ends.
//
// Limitations:
//
//   - The kernel keeps no state for a handshake that uses a SYN cookie. It sends SYN
//     cookies when the SYN queue overflows. If there may be such handshakes, the drain
//     waits for 3 s. The minimum TTL drops their final ACKs. It is therefore not used if
//     the kernel answers every SYN with a cookie (net.ipv4.tcp_syncookies is 2).
//   - The drain gives up a connection that an accept filter or [WithDeferAccept] holds
//     back for more than 3 s.
//   - If another holder of the socket accepts a connection that was made during the
//     drain, the connection keeps the filter or the minimum TTL. With the minimum TTL it
//     receives nothing.
//   - If the socket is in another network namespace, listing the in-flight handshakes
//     requires CAP_NET_ADMIN and CAP_SYS_ADMIN there. Without them the drain waits for
//     3 s.
//   - No system call reports the order of the listeners in a group. Steering computes it
//     from the changes since the listener joined. If the result is wrong, the kernel
//     drops some SYNs. Those clients retry after a second and are not lost.
//
// # Listeners on one address
//
// [WithReusePort] and [ListenShards] let several sockets listen on one address, and the
// kernel spreads new connections over them. It does not look at the queues: one queue
// can be full while another is empty.
//
// On Linux a drain attaches a BPF program to the group of the sockets. If the process is
// killed, the program stays. A listener that joins the group therefore detaches the
// program. The kernel does not report who attached a program, so a listener also detaches
// the program of other code. [WithoutSteering] prevents that.
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
