package sys

import (
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNetstatCounter(t *testing.T) {
	const tables = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 333\n" +
		"IpExt: InNoRoutes ListenDrops\nIpExt: 4 5\n"
	for name, row := range map[string]struct {
		text string
		want int64 // of ListenDrops in TcpExt
	}{
		"as the kernel writes it":             {tables, 333},
		"the other table first":               {"IpExt: A ListenDrops\nIpExt: 4 5\nTcpExt: ListenDrops\nTcpExt: 6\n", 6},
		"columns in another order":            {"TcpExt: ListenDrops A B\nTcpExt: 7 8 9\n", 7},
		"a column more than today":            {"TcpExt: A New ListenDrops\nTcpExt: 1 2 3\n", 3},
		"zero":                                {"TcpExt: ListenDrops\nTcpExt: 0\n", 0},
		"no newline at the end":               {"TcpExt: ListenDrops\nTcpExt: 10", 10},
		"spaces and tabs":                     {"TcpExt:  A\tListenDrops \nTcpExt:\t1   2\t\n", 2},
		"the newlines of another system":      {"TcpExt: A ListenDrops\r\nTcpExt: 1 2\r\n", 2},
		"the largest":                         {"TcpExt: ListenDrops\nTcpExt: 9223372036854775807\n", math.MaxInt64},
		"more values than names":              {"TcpExt: ListenDrops\nTcpExt: 1 2 3\n", 1},
		"names like it":                       {"TcpExt: ListenDropsX XListenDrops ListenDrops\nTcpExt: 1 2 3\n", 3},
		"the name twice":                      {"TcpExt: ListenDrops ListenDrops\nTcpExt: 1 2\n", 1},
		"the table twice":                     {"TcpExt: ListenDrops\nTcpExt: 1\nTcpExt: ListenDrops\nTcpExt: 2\n", 1},
		"lines between":                       {"TcpExt: ListenDrops\n\nIpExt: X\nTcpExt: 4\n", 4},
		"one too large for 64 bits":           {"TcpExt: ListenDrops\nTcpExt: 9223372036854775808\n", Unknown},
		"negative":                            {"TcpExt: ListenDrops\nTcpExt: -1\n", Unknown},
		"minus nothing":                       {"TcpExt: ListenDrops\nTcpExt: -0\n", Unknown},
		"a word":                              {"TcpExt: ListenDrops\nTcpExt: many\n", Unknown},
		"hexadecimal":                         {"TcpExt: ListenDrops\nTcpExt: 0x10\n", Unknown},
		"the column missing":                  {"TcpExt: A B\nTcpExt: 1 2\n", Unknown},
		"its value missing":                   {"TcpExt: A ListenDrops\nTcpExt: 1\n", Unknown},
		"all values missing":                  {"TcpExt: ListenDrops\nTcpExt:\n", Unknown},
		"the line of values missing":          {"TcpExt: ListenDrops\n", Unknown},
		"cut after the names":                 {"TcpExt: ListenDrops", Unknown},
		"the names missing":                   {"TcpExt:\nTcpExt: 1\n", Unknown},
		"the column in another table only":    {"TcpExt: A\nTcpExt: 1\nIpExt: ListenDrops\nIpExt: 2\n", Unknown},
		"the table missing":                   {"IpExt: ListenDrops\nIpExt: 2\n", Unknown},
		"a table whose name ends in this one": {"XTcpExt: ListenDrops\nXTcpExt: 2\n", Unknown},
		"no colon":                            {"TcpExt ListenDrops\nTcpExt 2\n", Unknown},
		"nothing":                             {"", Unknown},
		"newlines":                            {"\n\n\n", Unknown},
	} {
		require.Equal(t, row.want, NetstatCounter(row.text, "TcpExt", "ListenDrops"), name)
	}
	require.EqualValues(t, 5, NetstatCounter(tables, "IpExt", "ListenDrops"))

	// A table that is wider than that of any kernel; the test reads its last column.
	wide := strings.Repeat("Column ", 100_000) + "ListenDrops"
	values := strings.Repeat("1 ", 100_000) + "42"
	require.EqualValues(t, 42, NetstatCounter("TcpExt: "+wide+"\nTcpExt: "+values+"\n", "TcpExt", "ListenDrops"))
}

// FuzzNetstatCounter compares the parser with a slower one that works differently. The
// position of the column and the contents of other tables must not matter.
func FuzzNetstatCounter(f *testing.F) {
	f.Add("TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 333\nIpExt: ListenDrops\nIpExt: 4\n")
	f.Add("TcpExt: ListenDrops\nTcpExt: -1\n")
	f.Add("TcpExt: A ListenDrops\nTcpExt: 1")
	f.Add("TcpExt: ListenDrops")
	f.Add("TcpExt:\nTcpExt: 99999999999999999999\n\x00\xff")
	f.Add("TcpExt: ListenDrops\rTcpExt: 5\nTcpExt: +7\n")
	f.Fuzz(func(t *testing.T, text string) {
		const table, column = "TcpExt", "ListenDrops"
		got := NetstatCounter(text, table, column)
		require.Equal(t, plainCounter(text, table, column), got)
		require.GreaterOrEqual(t, got, int64(Unknown))

		other := "IpExt: ListenDrops\nIpExt: 987654321\n"
		require.Equal(t, got, NetstatCounter(other+text, table, column), "another table before it")
		if text == "" || strings.HasSuffix(text, "\n") {
			require.Equal(t, got, NetstatCounter(text+other, table, column), "another table after it")
			before := "TcpExt: First ListenDrops Last\nTcpExt: 1 2 3\n"
			require.EqualValues(t, 2, NetstatCounter(before+text, table, column), "the first pair of lines counts")
		}
		if got != Unknown {
			require.Contains(t, text, strconv.FormatInt(got, 10))
		}
	})
}

// plainCounter is another implementation of NetstatCounter. It collects all lines of
// the table, then splits the first two into columns.
func plainCounter(text, table, column string) int64 {
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		if rest, ok := strings.CutPrefix(line, table+":"); ok {
			lines = append(lines, rest)
		}
	}
	if len(lines) < 2 {
		return Unknown
	}
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	for i, name := range names {
		if name != column {
			continue
		}
		if i >= len(values) {
			return Unknown
		}
		n, err := strconv.ParseInt(values[i], 10, 64)
		if err != nil || strings.Trim(values[i], "0123456789") != "" {
			return Unknown
		}
		return n
	}
	return Unknown
}
