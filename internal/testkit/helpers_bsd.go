//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package testkit

import (
	"time"
)

// TooLong is the time limit of tests that wait for the kernel.
const TooLong = 20 * time.Second
