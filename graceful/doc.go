// Package graceful serves an [http.Server] until a context ends, and then stops it
// without losing a request.
//
// One call does both:
//
//	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
//	defer cancel()
//	ln, err := acceptq.ListenTCP(":8080", acceptq.WithReusePort())
//	if err != nil {
//		log.Fatal(err)
//	}
//	if err := graceful.Serve(ctx, srv, ln); err != nil {
//		log.Fatal(err)
//	}
//
// [http.Server.Shutdown] alone loses requests in four places. It closes the
// listener while connections wait in the accept queue, and the kernel resets them.
// It drops a request that it has just read on a new connection. It closes a
// kept-alive connection at the moment at which the client uses it again. It tells
// an HTTP/2 connection to go away before the first request on it has arrived.
//
// # How the server stops
//
// When ctx ends, [Serve] goes through these phases. Each has a time limit, and all
// of them together have one, see [WithTimeout].
//
//  1. The function of [WithOnStop] is called, and the server goes on as before for
//     the time of [WithDelay].
//  2. Clients are turned away: from now on every answer closes its connection. An
//     HTTP/1 answer carries "Connection: close", whatever the handler has set, and
//     an HTTP/2 connection gets a GOAWAY frame together with the answer. A kept-alive
//     connection that stays idle is left open for the time of [WithLinger], and a
//     request that comes on it still gets its answer. New connections are served.
//  3. The listeners are drained, see [acceptq.Listener.Drain], and closed: new clients
//     are kept out, and every connection that the kernel has accepted reaches the
//     server.
//  4. Connections on which no request has come yet are waited for, see
//     [WithFirstAnswerTimeout].
//  5. [http.Server.Shutdown] closes the idle connections, calls the functions of
//     [http.Server.RegisterOnShutdown], and waits for the requests that are being
//     answered. The streams of HTTP/2 end as well.
//
// A restart is complete only if another process listens on the port by then. Start
// the successor before the old process stops, and let both listen with
// [acceptq.WithReusePort]. The page docs/draining.md compares the ways to restart.
//
// # What stays the same
//
// The fields of the server go on working while Serve runs: Handler, ConnState,
// ConnContext, BaseContext and all others. Serve replaces some of them and puts
// them back before it returns, also if a handler hangs. The methods of the server,
// such as RegisterOnShutdown and SetKeepAlivesEnabled, work too.
//
// The handler gets an [http.ResponseWriter] with the same methods as that of
// net/http, and [http.ResponseController] works with it. One thing differs, as with
// every ResponseWriter that wraps another: [http.MaxBytesReader] cannot make net/http
// close the connection when the body is too large. net/http closes it then only if
// more than 256 KiB of the body are left.
//
// # WebSockets and other hijacked connections
//
// Shutdown neither closes nor waits for a hijacked connection. Serve waits until the
// handler that has hijacked it returns. Tell the connections to end with a function
// for [http.Server.RegisterOnShutdown], or with one for [WithOnStop] if they need
// more time. A connection whose handler has returned is not waited for: the program
// must do that before it exits. Answers that never end by themselves, such as
// server-sent events, need the same function.
//
// # What it cannot do
//
//   - An HTTP/1 answer whose header went out before the stop cannot carry
//     "Connection: close". Its connection gets the linger when it becomes idle, but if
//     the answer takes until phase 5, the connection is closed after it, and a request
//     that the client sends at that moment is lost.
//   - A kept-alive connection that is idle for longer than the linger is closed. A
//     request that is on its way at that moment is lost, as with any server.
//   - A stream that an HTTP/2 client opens at the moment of the GOAWAY is not answered.
//     The frame says so, and the client repeats the request on a new connection.
//   - Where the system has no way to keep new clients out, those that connect in the
//     last moment before the listener closes are reset, see [acceptq.Listener.Drain].
package graceful
