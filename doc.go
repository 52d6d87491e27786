// Package acceptq listens on TCP with an explicit backlog and reports the accept
// queue that the kernel granted.
//
// [net.Listen] uses the system-wide ceiling as its backlog, reads it once per process,
// and cannot say what the kernel granted. Here the caller chooses the backlog, and the
// listener reports the result:
//
//	ln, err := acceptq.ListenTCP(":8080", acceptq.WithBacklog(4096))
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Print(ln.Backlog()) // asked 4096, granted 128, holds 129; net.core.somaxconn is 128: ...
//	log.Fatal(http.Serve(ln, nil))
//
// [Listener.Stats] reads how full the queue is, and [Listener.SetBacklog] changes its
// length while clients are served. [Wrap] does the same for a listener of package net,
// systemd or another library. [ListenTCPShards] gives one address several queues.
//
// # Words
//
//   - backlog: the number passed to listen(2).
//   - ceiling: the system-wide maximum, such as net.core.somaxconn.
//   - limit: what the kernel stored on this socket after clamping.
//   - effective backlog: the length to which the accept queue may grow.
//   - capacity: how many finished handshakes fit before the next is refused.
//   - accept queue: the finished handshakes that wait for Accept.
//   - SYN queue: the unfinished handshakes.
//
// # Stopping a server
//
// Closing a listening socket resets every connection that waits in its queue, and every
// handshake that finishes a moment later. [net/http.Server.Shutdown] closes it first.
//
// Package [github.com/acceptq/acceptq/graceful] serves a [net/http.Server] and stops it
// without losing a request. For other servers the steps are:
//
//  1. Call [Listener.Drain] while the server goes on accepting.
//  2. Wait until no connection is before its first answer.
//  3. Shut the server down, which closes the listener.
//
// The page [docs/draining.md] has the kinds of restart, Kubernetes, gRPC and other servers.
//
// # Draining
//
// [Listener.Drain] reads the accept queue every few milliseconds until the handshakes
// that began before the drain are over and their connections accepted. The systems differ
// in how it keeps new clients out meanwhile:
//
//   - Linux, with CAP_NET_ADMIN: a socket filter drops SYNs, and everything else passes.
//     Kernels before mid-2026 need no privilege for it.
//   - Linux, without: a minimum TTL of 255 (IP_MINTTL, IPV6_MINHOPCOUNT) drops what most
//     clients send. A client that sends with TTL 255 and is no router away still gets in.
//     Data that is sent before Accept arrives with its retransmission.
//   - Other systems, and MPTCP: nothing does. The drain ends at the first moment at which
//     the queue is empty, with [ErrStillOpen].
//
// The minimum TTL is also used if the socket has a filter of its own, which stays. If the
// socket has a minimum TTL above 128 of its own, that stays too, and without the filter
// nothing keeps new clients out: the drain ends with ErrStillOpen.
//
// Handshakes in flight. On Linux the kernel lists them (sock_diag(7)). The drain waits for
// those that it finds at its start, but 3 s at most, since some clients never finish. It
// waits equally long for connections that FreeBSD reports as held back by an accept
// filter. If the kernel does not list the handshakes, the drain waits for 3 s.
//
// Steering. On Linux a listener made with [WithReusePort] shares its address. A drain
// attaches a BPF program to that group (SO_ATTACH_REUSEPORT_CBPF), which gives new clients
// to the listeners that do not drain, so that these clients do not wait. [WithoutSteering]
// and a shared socket prevent it; the SYNs are dropped then.
//
// Accepted connections. On Linux a connection made during the drain inherits the filter or
// the minimum TTL. Accept removes it from the connection.
//
// Shared sockets. A socket counts as shared after [Wrap], after [Listener.File], and if
// this process holds a duplicate of its descriptor. Its other holder must not lose its
// clients, so the drain lets new clients in again before it returns, and returns
// ErrStillOpen. If a process is killed while it drains a socket that others hold, the
// filter or the minimum TTL stays, until another holder calls [Wrap] or ends a drain of
// its own.
//
// What a drain cannot do:
//
//   - The kernel keeps no state for a handshake with a SYN cookie, which it uses when the
//     SYN queue overflows. If there may be some, the drain waits for 3 s. The minimum TTL
//     drops their final ACKs. It is not used if every SYN gets a cookie
//     (net.ipv4.tcp_syncookies is 2).
//   - A connection that an accept filter or [WithDeferAccept] holds back is given up
//     after 3 s.
//   - A connection made during the drain that another holder of the socket accepts keeps the
//     filter or the minimum TTL; with the minimum TTL it receives nothing.
//   - For a socket in another network namespace, seeing the handshakes in flight needs
//     CAP_NET_ADMIN and CAP_SYS_ADMIN there. Without them the wait is 3 s.
//   - Steering follows the group from the time of listening. If its guess is wrong, the
//     clients that fall to a draining listener wait for a second and are not lost.
//
// # Systems
//
// On Linux and FreeBSD the limit is read from the socket. On macOS, NetBSD, OpenBSD and
// DragonFly it is computed from the kernel's rule. On the others (Windows, Solaris,
// illumos, AIX, Plan 9, js, wasip1) package net makes the socket, the backlog is a hint, and
// the limit is unknown, which is -1 and never 0. The page [docs/systems.md] has the details.
//
// [docs/draining.md]: https://github.com/acceptq/acceptq/blob/main/docs/draining.md
// [docs/systems.md]: https://github.com/acceptq/acceptq/blob/main/docs/systems.md
package acceptq
