package graceful

import "fmt"

// An Error says what a stop has cut off. It unwraps to the reasons: it matches
// [context.DeadlineExceeded] if a time limit ended a phase, the cause of the context
// of [WithAbort] if that ended, [context.Canceled] if a signal came, and an
// [*acceptq.DrainError] if a drain did not end.
type Error struct {
	// Queued is the number of connections that waited in the accept queues and that
	// the kernel has reset.
	Queued int
	// BeforeFirstAnswer is the number of connections that were closed before a
	// request had arrived on them. A client that opens connections in advance and
	// sends nothing counts too, since its request could have been on its way.
	// HTTP/2 connections are not counted once the handshake is over: GOAWAY tells
	// their clients that no request was served.
	BeforeFirstAnswer int
	// Active is the number of connections that were closed while a request was being
	// answered, and of hijacked ones whose handler has not returned. Serve does not
	// close the latter.
	Active int

	err error
}

func (e *Error) Error() string {
	return fmt.Sprintf("graceful: cut off: %d queued, %d before the first answer, %d active: %v",
		e.Queued, e.BeforeFirstAnswer, e.Active, e.err)
}

// Unwrap returns the reasons.
func (e *Error) Unwrap() error { return e.err }
