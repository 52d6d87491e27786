package testkit

import (
	"os"
	"strconv"
)

// Factor returns the value of ACCEPTQ_ROUNDS, by which tests that repeat something multiply
// their rounds. It is 1 by default, so that the tests end soon.
func Factor() int {
	n, err := strconv.Atoi(os.Getenv("ACCEPTQ_ROUNDS"))
	if err != nil {
		return 1
	}
	return max(n, 1)
}
