package testkit

import (
	"fmt"
	"net"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// Main runs the tests of a package for its TestMain, up to twelve at a time. It fails the run
// if it leaves a goroutine or a descriptor behind.
func Main(m *testing.M) {
	Parallel(12)
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close() // the runtime's poller keeps descriptors of its own from here on
	}
	before := OpenDescriptors()
	code := m.Run()
	if code == 0 {
		// On js the runtime has its own goroutine for events.
		if err := goleak.Find(goleak.IgnoreAnyFunction("runtime.handleEvent")); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
		if after := OpenDescriptors(); after > before {
			fmt.Fprintf(os.Stderr, "descriptors left behind: %d before, %d after\n", before, after)
			code = 1
		}
	}
	os.Exit(code)
}
