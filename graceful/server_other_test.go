//go:build !linux

package graceful

import "errors"

// serverProgram is for the tests that start servers as processes.
func serverProgram() error { return errors.ErrUnsupported }
