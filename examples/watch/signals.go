//go:build !js

package main

import (
	"os"
	"syscall"
)

// endSignals end the program after it has restored the cursor of the terminal.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
