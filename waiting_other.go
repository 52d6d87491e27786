//go:build !linux

package acceptq

import (
	"context"
	"errors"
	"fmt"
)

// waiting returns an error, because these systems do not report which connections are
// queued. FreeBSD's net.inet.tcp.pcblist has a row for each connection, including queued
// ones. But struct xtcpcb of netinet/tcp_var.h contains neither the listener nor the time
// at which the connection was made. The lists of the other systems have the same origin.
func (*kernel) waiting(context.Context, []*Listener) ([]Waiting, error) {
	return nil, fmt.Errorf("this system does not list the connections in the accept queue: %w", errors.ErrUnsupported)
}
