package sys

import (
	"slices"
	"strconv"
	"strings"
)

// NetstatCounter returns one counter from the text of /proc/net/netstat. Each table there
// has two lines that begin with its name: the names of the columns and their values. A
// column is found by its name, because a new kernel may add columns anywhere. The counter
// is unknown if the table or the column is missing or is not a number.
func NetstatCounter(text, table, column string) int64 {
	var names []string
	for line := range strings.Lines(text) {
		prefix, rest, _ := strings.Cut(line, ":")
		if prefix != table {
			continue
		}
		fields := strings.Fields(rest)
		if names == nil {
			names = fields
			continue
		}
		i := slices.Index(names, column)
		if i < 0 || i >= len(fields) {
			return Unknown
		}
		n, err := strconv.ParseUint(fields[i], 10, 63)
		if err != nil {
			return Unknown
		}
		return int64(n)
	}
	return Unknown
}
