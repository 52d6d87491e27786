//go:build !(dragonfly || freebsd)

package testkit

// kernelSpreads: on the other systems the result does not depend on the release or a jail.
func kernelSpreads() bool { return false }
