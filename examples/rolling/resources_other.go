//go:build !unix

package main

// outOfResources returns false: these systems have no such limit, or another error for it.
func outOfResources(error) bool { return false }
