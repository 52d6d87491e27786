//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package sys

// Calls is empty on the systems on which package net makes the socket. Their rules are not
// known, or they do not report the numbers.
type Calls struct{}

// Real is the table of the running system.
var Real Calls
