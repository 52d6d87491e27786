//go:build dragonfly || freebsd || linux

package testkit

import (
	"testing"
)

// NeedSpread skips a test if the kernel does not spread connections over shards.
func NeedSpread(t *testing.T) {
	t.Helper()
	if !Spreads() {
		t.Skip("this kernel gives all connections to one of several listeners (in a jail FreeBSD before 13.3 does, and DragonFly): run it outside of the jail")
	}
}
