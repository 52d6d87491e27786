//go:build unix

package main

import (
	"errors"
	"syscall"
)

// outOfResources reports whether this process has no descriptor or port left for a client.
func outOfResources(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.EADDRNOTAVAIL)
}
