package acceptqprom

import (
	"os/exec"
	"testing"

	"github.com/acceptq/acceptq/internal/testkit"
)

// program returns the path of a program, which Debian has in a package. In CI a program
// that is missing is a failure.
func program(t *testing.T, name, debian string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		testkit.SkipUnprivileged(t, name+" is not installed: apt-get install "+debian)
	}
	return path
}
