//go:build !linux

package acceptq

import (
	"errors"
	"net"
	"time"
)

// QueueTime stands in for the function of that name until it lands.
func QueueTime(net.Conn) (time.Duration, error) { return unknown, errors.ErrUnsupported }
