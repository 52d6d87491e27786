//go:build !linux

package observe

import (
	"context"
	"errors"
	"fmt"
)

func processes(context.Context, map[uint64]int) (map[uint64][]Process, bool, error) {
	return nil, false, fmt.Errorf("acceptq: this system does not list the holders of a socket: %w", errors.ErrUnsupported)
}
