//go:build !linux

package acceptq

import (
	"context"
	"errors"
	"fmt"
)

// waiting: FreeBSD's net.inet.tcp.pcblist has a row for each connection, also for
// those that are queued. struct xtcpcb of netinet/tcp_var.h names neither the
// listener nor the time at which the connection was made, only that of the last
// segment. The lists of the other systems come from the same source.
func (*kernel) waiting(context.Context, []*Listener) ([]Waiting, error) {
	return nil, fmt.Errorf("the connections in the accept queue: %w", errors.ErrUnsupported)
}
