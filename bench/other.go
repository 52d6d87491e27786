//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: Linux only: it needs network namespaces, and peers that read Linux's queues")
	os.Exit(1)
}
