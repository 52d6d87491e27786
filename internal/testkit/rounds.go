package testkit

import (
	"flag"
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

// Parallel lets n tests run at a time, unless the command line says how many, or is that of
// a fuzz test. Most tests wait for the kernel, so there may be more of them than processors.
func Parallel(n int) {
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if asked := flag.Lookup("test.parallel"); asked.Value.String() == asked.DefValue && !fuzzing {
		asked.Value.Set(strconv.Itoa(n))
	}
}
