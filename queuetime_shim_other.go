//go:build !linux

package acceptq

import (
	"errors"
	"syscall"
	"time"
)

// QueueTime stands in for the function of that name until it lands.
func QueueTime(syscall.Conn) (time.Duration, error) { return 0, errors.ErrUnsupported }
