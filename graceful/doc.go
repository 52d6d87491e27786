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
// [http.Server.Shutdown] alone loses requests: those of connections in the accept queue, and
// others. The page [docs/draining.md] lists them, and compares the ways to restart.
//
// [ServeGRPC] does the same for a gRPC server, and [Run] for a server of any other kind.
//
// # How the server stops
//
// When ctx ends, [Serve] stops the server in five phases. [WithTimeout] limits all of them
// together, and each phase gets what is left of that time. The last 5 s of it, or its last
// fifth if that is less, are reserved for phases 3 to 5.
//
//  1. Serve calls the function of [WithOnStop]. The server then continues as before for
//     the time of [WithDelay].
//  2. From now on every answer closes its connection. An HTTP/1 answer has the header
//     "Connection: close", even if the handler has set another. An HTTP/2 connection
//     gets a GOAWAY frame with the answer. An idle kept-alive connection stays open for
//     the time of [WithLinger], and a request on it is still answered. Then Serve closes
//     it if it is an HTTP/1 connection, unless a part of a request has arrived, which
//     only Linux reports. New connections are served.
//  3. Serve drains the listeners, see [acceptq.Listener.Drain], and closes them. New
//     clients are kept out, and the server accepts every connection in the queue. The
//     drain goes on while the queue shrinks or a request is being answered. If neither
//     happens for 5 s, Serve closes new connections whose clients are silent, and HTTP/2
//     connections at rest. They may be what Accept waits for, as with a limit on the
//     number of connections. After another 5 s the drain ends.
//  4. Serve waits for the first request on new connections, for at most 5 s.
//  5. [http.Server.Shutdown] closes the idle connections and calls the functions of
//     [http.Server.RegisterOnShutdown]. Serve waits for the requests that are being
//     answered, including HTTP/2 streams whose client has gone.
//
// If [WithTimeout] is below 25 s, a fifth of it takes the place of each 5 s. An ordinary
// stop returns nil. A client that has connected and has sent nothing makes it last up to
// 5 s longer. On Linux, which tells such clients from others, that is not an error.
//
// All functions of the caller run in the background, and so does closing a connection. If
// one hangs, the stop still ends in time.
//
// If no other process listens on the port by then, the kernel refuses new clients. Start
// the new process before the old one stops, and let both listen with
// [acceptq.WithReusePort].
//
// # The server and its handler
//
// All fields of the server work while Serve runs, including Handler, ConnState,
// ConnContext and BaseContext. Serve replaces some of them and does not restore them,
// because a server that was shut down cannot serve again. The methods of the server work
// too, such as RegisterOnShutdown and SetKeepAlivesEnabled.
//
// The handler gets an [http.ResponseWriter] with the same methods as that of net/http.
// [http.ResponseController] works with it. [http.MaxBytesReader] works too. If a body
// exceeds its limit, net/http closes the connection only if more than 256 KiB of the body
// are left, as with every ResponseWriter that wraps another.
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
// h2c.NewHandler of golang.org/x/net hijacks each connection too. It does not send GOAWAY,
// and the stop waits until its clients leave. Use [http.Protocols.SetUnencryptedHTTP2]
// instead. http2.ConfigureServer of golang.org/x/net loses requests in a stop. net/http
// needs neither.
//
// # Limitations
//
// The section [What is left] of docs/draining.md lists the requests that no server can save.
// The most frequent one is the next request of a client that was idle for longer than the
// linger and does not notice that its connection is closed, see [WithLinger].
//
//   - net/http reads the header of an HTTP/1 answer when the handler calls WriteHeader or
//     Write for the first time. If that was before the stop, the answer cannot contain
//     "Connection: close". When the answer ends, the connection stays open for the linger.
//     If the answer lasts until phase 5, the connection is closed right after it.
//   - If the system has no way to keep new clients out, the kernel resets those that
//     connect right before the listener closes, see [acceptq.Listener.Drain].
//
// [docs/draining.md]: https://github.com/acceptq/acceptq/blob/main/docs/draining.md#what-shutdown-loses
// [What is left]: https://github.com/acceptq/acceptq/blob/main/docs/draining.md#what-is-left
package graceful
