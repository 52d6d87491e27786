package testkit

import (
	"runtime"
	"slices"
	"testing"
)

// Spreads reports whether this system spreads connections over shards. It goes by the
// name of the system or by the behavior of the kernel, not by the library.
func Spreads() bool {
	return slices.Contains([]string{"linux", "android"}, runtime.GOOS) || kernelSpreads()
}

// NeedSpread skips a test if the kernel does not spread connections over shards.
func NeedSpread(t *testing.T) {
	t.Helper()
	if !Spreads() {
		t.Skip("this kernel gives all connections to one of several listeners (in a jail FreeBSD before 13.3 does, and DragonFly): run it outside of the jail")
	}
}
