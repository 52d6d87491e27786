// Package acceptq listens on TCP with an explicit backlog and reports the accept
// queue that the kernel granted.
//
// The accept queue has the connections that have finished the handshake and wait for
// Accept. The backlog bounds its length. [net.Listen] uses the system-wide ceiling as its
// backlog, reads that ceiling once per process, and does not report what the kernel granted.
// With this package the caller chooses the backlog, and the listener reports the result:
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
// The fields of [Backlog] define the terms. The page [docs/systems.md] has a picture.
//
// # Stopping a server
//
// When a listening socket is closed, the kernel resets every connection that waits in
// its queue and every handshake that finishes afterwards. [net/http.Server.Shutdown]
// closes the socket first.
//
// Package [github.com/acceptq/acceptq/graceful] serves a [net/http.Server], a gRPC server
// or any other, and stops it without losing a request. By hand the steps are:
//
//  1. Call [Listener.Drain] while the server continues to accept.
//  2. Wait until the server has sent something on every connection.
//  3. Shut the server down, which closes the listener.
//
// The page [docs/draining.md] compares the ways to restart.
//
// # Draining
//
// [Listener.Drain] keeps new clients out, and ends when the handshakes that began before it
// are finished and Accept has returned their connections. The way to keep clients out
// depends on the system:
//
//   - Linux with CAP_NET_ADMIN: a socket filter drops SYNs and passes all other packets.
//     Kernels released before mid-2026 allow the filter without the capability.
//   - Linux without the filter: a minimum TTL of 255 (IP_MINTTL, IPV6_MINHOPCOUNT). A client
//     that sends with TTL 255 still gets in if no router is between it and the server. The
//     kernel drops data that arrives before Accept, and the client sends it again.
//   - Other systems, and MPTCP sockets: nothing. As soon as the queue is empty, the drain
//     ends with [ErrStillOpen].
//
// Drain does not replace a filter or a minimum TTL of the caller, see [docs/systems.md]. If
// that leaves no way to keep clients out, it ends with ErrStillOpen.
//
// Waiting. Drain waits for at most 3 s for in-flight handshakes, because some clients never
// finish. The 3 s start again while an accept queue is full. On Linux sock_diag(7) lists
// the handshakes. The drain waits for the whole 3 s if some may be missing from that list:
//   - The kernel has ever sent a SYN cookie in this network namespace (SyncookiesSent in
//     /proc/net/netstat), or may have.
//   - The listener has IP_TRANSPARENT (ip(7)), or Accept has returned a client of another
//     local port.
//   - The socket is in another network namespace, and the process does not have
//     CAP_NET_ADMIN and CAP_SYS_ADMIN there.
//
// Drain also waits for at most 3 s for connections that an accept filter holds back. With a
// filter it waits for the whole 3 s on NetBSD and DragonFly. When the queue is empty, it
// waits for at most 1 s until each goroutine that got a connection has called Accept again.
//
// Steering. While listeners made with [WithReusePort] drain on Linux, a BPF program directs
// new clients to the other listeners of the address. A drain asks the kernel which of them
// answer: it sends a SYN over the loopback interface to each, without making a connection.
// The kernel counts that in [Stats].Drops. Drains in several processes take turns. Where no
// steering is possible, see [docs/draining.md], the kernel drops the SYNs that it assigns to
// a draining listener, and their clients stall.
//
// Shared sockets. A socket counts as shared after [Wrap] and [Listener.File], and on Linux
// if Drain or SyscallConn finds that this process has duplicated its descriptor. The other
// holder must not lose its clients, so the drain lets new clients in again when it ends,
// and returns ErrStillOpen. After a process was killed during such a drain, new clients
// stay out until another holder calls Wrap, Resume or File, or ends a drain.
//
// Limitations:
//
//   - Close resets a connection that an accept filter or [WithDeferAccept] has held back
//     for the 3 s.
//   - A connection that is made during a drain inherits the filter or the minimum TTL.
//     Accept removes it. If another holder of the socket accepts the connection, or
//     net.ipv4.tcp_migrate_req moves it to a program without this package, the connection
//     keeps it, and with the minimum TTL it receives nothing.
//
// # Listeners on one address
//
// [WithReusePort] and [ListenShards] let several sockets listen on one address, and the
// kernel spreads new connections over them. It does not look at the queues: one queue
// can be full while another is empty.
//
// On Linux the BPF program of a drain stays on the group after the last Close, and if the
// process is killed. A listener that joins the group therefore asks which listeners answer,
// see "Draining". If all do, it detaches any program. Otherwise it attaches a program that
// picks the listeners that answer. The kernel does not report which process attached a
// program, so the program of other code is replaced too. [WithoutSteering] prevents that.
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
