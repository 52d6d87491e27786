package sys

import (
	"fmt"
	"net"
	"syscall"
)

// ErrNotListening is the error for a socket that is not a listening TCP socket. It
// matches EINVAL, which accept(2) returns for such a socket.
var ErrNotListening = fmt.Errorf("not a listening TCP socket: %w", syscall.EINVAL)

// Cause returns the error inside a *net.OpError. The methods of this package wrap it
// again, with their own Op.
func Cause(err error) error {
	if op, ok := err.(*net.OpError); ok {
		return op.Err
	}
	return err
}
