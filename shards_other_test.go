//go:build !(dragonfly || freebsd)

package acceptq

// kernelSpreads: what the others do does not depend on the release or on a jail.
func kernelSpreads() bool { return false }
