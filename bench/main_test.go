//go:build linux

package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/acceptq/acceptq/bench/internal/isolate"
)

// TestMain runs everything in a new process with namespaces of its own, see package isolate.
func TestMain(m *testing.M) {
	const env = "ACCEPTQ_BENCH_NAMESPACE"
	if os.Getenv(env) != "" {
		if err := isolate.Enter(); err != nil {
			fmt.Fprintln(os.Stderr, "namespace:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	cmd := isolate.Command(os.Args[1:]...)
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.Stdout = os.Stdout
	if err := isolate.Explain(cmd, cmd.Run()); err != nil {
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}
