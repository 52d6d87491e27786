//go:build !js

package main

import (
	"os"
	"syscall"
)

// endSignals end the program in good order: a terminal gets its cursor back.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
