//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: Linux only: it needs network namespaces, and libraries that read the queues of Linux")
	os.Exit(1)
}
