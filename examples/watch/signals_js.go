package main

import "os"

// endSignals has no SIGHUP: package syscall does not have it on js.
var endSignals = []os.Signal{os.Interrupt}
