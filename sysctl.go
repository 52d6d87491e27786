package acceptq

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// errNoRule is the error of asking for a ceiling where the package knows of none.
var errNoRule = fmt.Errorf("acceptq: the ceiling of this system: %w", errors.ErrUnsupported)

// parseSysctl reads the text of a /proc/sys file that holds one number of
// connections. The kernel ends it with a newline.
func parseSysctl(text string) (int, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
	if err != nil {
		return unknown, err
	}
	if n < 0 {
		return unknown, &strconv.NumError{Func: "ParseInt", Num: text, Err: strconv.ErrRange}
	}
	return int(n), nil
}

// sysctlCount turns the unsigned number of a BSD's sysctl(3) into a number of
// connections.
func sysctlCount(n uint32) int {
	return int(min(n, math.MaxInt32))
}
