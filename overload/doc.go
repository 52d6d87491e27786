// Package overload keeps a server useful while more clients come than it can serve, and
// tells a health check whether it still accepts connections.
//
// A [Shedder] sheds clients that have waited in the accept queue for longer than a budget:
// it answers them with 503. They have given up or are about to, and the work for them
// delays everybody else:
//
//	shed := overload.NewShedder(500 * time.Millisecond)
//	srv := &http.Server{Handler: shed.Handler(mux), ConnContext: shed.ConnContext}
//
// For a server other than net/http, or with TLS, a listener closes late connections before
// any work begins:
//
//	server.Serve(tls.NewListener(shed.Listener(ln), config))
//
// Shedding is for a load that lasts. After a rare pause it sheds clients that would have
// been served, so the budget must be longer than the pauses of the server. The queue must
// be long too. Otherwise the kernel drops late clients before a Shedder sees them.
//
// [Health] is a handler for the health check of a load balancer or of Kubernetes. Serve it on
// a port of its own. A check that waits in the queue of the clients fails when that queue
// is full:
//
//	admin.Handle("/healthz", overload.Health(5*time.Second, ln))
//
// The page [docs/overload.md] says how to choose the budget, and how much shedding helps.
//
// [docs/overload.md]: https://github.com/acceptq/acceptq/blob/main/docs/overload.md
package overload
