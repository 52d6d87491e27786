//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package sys

// This file, drain_other.go and steer_other.go are the smallest port.
// See kernel_unix.go for what a port provides.

// Calls stands for a system on which package net makes the socket. Its rules are not
// known, or it does not report the numbers.
type Calls struct{}

var Real Calls
