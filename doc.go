// Package acceptq listens on TCP with an accept queue of a known length.
//
// net.Listen takes the system's ceiling for a backlog, reads it once in the
// life of a process, and cannot say what the kernel granted. Here the backlog is
// asked for, and the listener tells what became of it:
//
//	ln, err := acceptq.ListenTCP(":8080", acceptq.WithBacklog(4096))
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Print(ln.Backlog()) // asked 4096, granted 128, holds 129; net.core.somaxconn is 128: ...
//	log.Fatal(http.Serve(ln, nil))
//
// # Words
//
// The backlog is the number passed to listen(2). The ceiling is the system-wide
// maximum (net.core.somaxconn, kern.ipc.soacceptqueue, ...). The limit is what
// the kernel stored on this socket after clamping. The effective backlog is the
// length to which the accept queue may grow, and the capacity is how many
// finished handshakes really fit. The accept queue holds finished handshakes
// that wait for Accept, the SYN queue unfinished ones.
//
// # Stopping
//
// Closing a listening socket resets every connection that waits in its queue, and
// every handshake that ends a moment later. To stop without losing anyone: call
// [Listener.Drain] while the server goes on accepting; wait until no connection is
// before its first answer, which [net/http.Server.ConnState] tells; then call
// [net/http.Server.Shutdown], which closes the listener. [Listener.Drain] says
// what it cannot do, and its example shows the whole. For gRPC it is the same with
// GracefulStop, which closes connections that it has accepted and not yet begun to
// serve: wait until the server has written something to each.
//
// In Kubernetes begin when the load balancer has let go of the pod: let a preStop
// hook sleep for as long as the endpoints take to be withdrawn, and make
// terminationGracePeriodSeconds longer than that hook and the drain together. A
// drain that begins earlier makes new clients wait for a second where a closed
// port would have refused them at once.
//
// # Systems
//
// On Linux and FreeBSD the limit is read from the socket. On macOS, NetBSD,
// OpenBSD and DragonFly it is worked out from the kernel's rule. On the others
// (Windows, Solaris, illumos, AIX, Plan 9, js, wasip1) net makes the socket,
// the backlog is a hint, and the limit is unknown, which is -1 and never 0.
package acceptq
