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
// [http.Server.Shutdown] alone loses requests in four situations:
//   - It closes the listener while connections wait in the accept queue. The kernel
//     resets these connections.
//   - It drops a request that it has just read on a new connection.
//   - It closes a kept-alive connection while the client sends the next request on it.
//   - It sends GOAWAY on an HTTP/2 connection before the first request has arrived.
//
// # How the server stops
//
// When ctx ends, [Serve] stops the server in these phases. Each phase has a time limit.
// [WithTimeout] limits all of them together.
//
//  1. Serve calls the function of [WithOnStop]. The server then continues as before for
//     the time of [WithDelay].
//  2. From now on every answer closes its connection. An HTTP/1 answer has the header
//     "Connection: close", even if the handler has set another. An HTTP/2 connection
//     gets a GOAWAY frame with the answer. An idle kept-alive connection stays open for
//     the time of [WithLinger], and a request on it is still answered. New connections
//     are served.
//  3. Serve drains the listeners, see [acceptq.Listener.Drain], and closes them. New
//     clients are kept out, and the server accepts every connection in the queue.
//  4. Serve waits for the first request on new connections, see
//     [WithFirstAnswerTimeout].
//  5. [http.Server.Shutdown] closes the idle connections and calls the functions of
//     [http.Server.RegisterOnShutdown]. It waits for the requests that are being
//     answered, including HTTP/2 streams.
//
// If no other process listens on the port by then, the kernel refuses new clients. Start
// the new process before the old one stops, and let both listen with
// [acceptq.WithReusePort]. The page docs/draining.md compares the ways to restart.
//
// # The server and its handler
//
// All fields of the server work while Serve runs, including Handler, ConnState,
// ConnContext and BaseContext. Serve replaces some of them and restores them before it
// returns, even if a handler hangs. The methods of the server work too, such as
// RegisterOnShutdown and SetKeepAlivesEnabled.
//
// The handler gets an [http.ResponseWriter] with the same methods as that of net/http.
// [http.ResponseController] works with it. [http.MaxBytesReader] works too, but it cannot
// make net/http close the connection if the body is too large. net/http then closes it
// only if more than 256 KiB of the body are left. This is so for every ResponseWriter
// that wraps another.
//
// # WebSockets and other hijacked connections
//
// Shutdown neither closes hijacked connections nor waits for them. Serve waits until the
// handler that hijacked the connection returns. If the handler leaves the connection to
// another goroutine, the program must wait for that goroutine before it exits.
//
// Use a function for [http.Server.RegisterOnShutdown] to end the connections. If they need
// more time, use [WithOnStop]. Answers that do not end by themselves, such as server-sent
// events, need such a function too.
//
// # Limitations
//
//   - If the header of an HTTP/1 answer was sent before the stop, it cannot contain
//     "Connection: close". When the answer ends, the connection stays open for the linger.
//     If the answer lasts until phase 5, the connection is closed right after it. A
//     request that the client sends at that moment is lost.
//   - A kept-alive connection that is idle for longer than the linger is closed. A
//     request that is on its way at that moment is lost, as with any server.
//   - If an HTTP/2 client opens a stream at the moment of the GOAWAY, the stream is not
//     answered. The frame says so. The client then repeats the request on a new
//     connection.
//   - If the system has no way to keep new clients out, the kernel resets those that
//     connect right before the listener closes, see [acceptq.Listener.Drain].
package graceful
