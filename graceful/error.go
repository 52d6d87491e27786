package graceful

import "fmt"

// An Error reports what a stop has cut off. It unwraps to the reasons:
//   - [context.DeadlineExceeded]: the time of [WithTimeout] ended, or nothing moved for a
//     while, see the package comment.
//   - The cause of the context of [WithAbort]: that context ended.
//   - [context.Canceled]: a signal of [WithAbortSignal] arrived.
//   - [*acceptq.DrainError]: a drain did not end.
//   - [http.ErrServerClosed]: other code closed the server during the stop.
type Error struct {
	// Queued is the number of connections in the accept queues that the kernel has
	// reset. It is -1 if the length of a queue is unknown.
	Queued int
	// BeforeFirstAnswer is the number of connections that were closed after a part of
	// their first request had arrived. It does not include connections on which nothing
	// had arrived, if the system reports that, as Linux does. It includes a listener
	// whose Accept method has not returned, because it may hold a connection.
	BeforeFirstAnswer int
	// Active is the number of connections that were closed while a request arrived or was
	// being answered. If the handler has not returned, it includes hijacked connections,
	// which Serve does not close, and HTTP/2 connections whose client has gone. With [Run]
	// and [ServeGRPC] it is the number of answered connections that were still open.
	Active int

	err error
}

func (e *Error) Error() string {
	queued := fmt.Sprint(e.Queued)
	if e.Queued < 0 {
		queued = "unknown"
	}
	return fmt.Sprintf("graceful: cut off: %s queued, %d before the first answer, %d active: %v",
		queued, e.BeforeFirstAnswer, e.Active, e.err)
}

// Unwrap returns the reasons.
func (e *Error) Unwrap() error { return e.err }
