//go:build unix

package main

import (
	"os/signal"
	"syscall"
)

// With SIGPIPE ignored, a write to a closed pipe returns an error that the program
// can report. By default the signal ends the process without a word.
func init() { signal.Ignore(syscall.SIGPIPE) }
