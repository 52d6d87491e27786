package graceful

import "fmt"

// An Error reports what a stop has cut off. It unwraps to the reasons:
//   - [context.DeadlineExceeded]: a time limit ended a phase.
//   - The cause of the context of [WithAbort]: that context ended.
//   - [context.Canceled]: a signal of [WithAbortSignal] arrived.
//   - [*acceptq.DrainError]: a drain did not end.
type Error struct {
	// Queued is the number of connections in the accept queues that the kernel has
	// reset. It is -1 if the length of a queue is unknown.
	Queued int
	// BeforeFirstAnswer is the number of connections that were closed before a request
	// had arrived. It includes connections on which the client would not have sent
	// anything. It does not include HTTP/2 connections after their handshake, because
	// GOAWAY tells the client that no request was served.
	BeforeFirstAnswer int
	// Active is the number of connections that were closed while a request was being
	// answered. It includes hijacked connections whose handler has not returned, which
	// Serve does not close.
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
