package testkit

import (
	"time"
)

// Repeat returns a side that makes many calls, because one call is too short to time.
func Repeat(n int, f func()) Side {
	return func() time.Duration {
		start := time.Now()
		for range n {
			f()
		}
		return time.Since(start)
	}
}
