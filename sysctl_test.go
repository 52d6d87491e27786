package acceptq

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseSysctl(t *testing.T) {
	for _, tt := range []struct {
		rule string
		text string
		want int
		err  error
	}{
		{"the newline of the kernel is ignored", "4096\n", 4096, nil},
		{"no newline", "128", 128, nil},
		{"surrounding space is ignored", " \t128 \n\n", 128, nil},
		{"zero is a number", "0\n", 0, nil},
		{"the largest int is accepted", "2147483647\n", math.MaxInt32, nil},
		{"one more is out of range", "2147483648\n", unknown, strconv.ErrRange},
		{"much more is out of range", "99999999999999999999\n", unknown, strconv.ErrRange},
		{"a negative number is out of range", "-1\n", unknown, strconv.ErrRange},
		{"an empty text is not a number", "", unknown, strconv.ErrSyntax},
		{"an empty line is not a number", "\n", unknown, strconv.ErrSyntax},
		{"two numbers are an error", "4096\t87380\n", unknown, strconv.ErrSyntax},
		{"hexadecimal is an error", "0x80\n", unknown, strconv.ErrSyntax},
		{"a text is not a number", "net.core.somaxconn = 128\n", unknown, strconv.ErrSyntax},
		{"a NUL is not space", "128\x00", unknown, strconv.ErrSyntax},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			n, err := parseSysctl(tt.text)
			require.Equal(t, tt.want, n)
			if tt.err == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, tt.err)
			}
		})
	}
}

func FuzzParseSysctl(f *testing.F) {
	for _, text := range []string{"4096\n", "", "-1", "2147483648", " 128 ", "0", "0x80", "1\n2", "\x00"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := parseSysctl(text)
		if err != nil {
			require.Equal(t, unknown, n)
			require.True(t, errors.Is(err, strconv.ErrSyntax) || errors.Is(err, strconv.ErrRange), "%v", err)
			return
		}
		require.True(t, 0 <= n && n <= math.MaxInt32, "%d", n)
		again, err := parseSysctl(strconv.Itoa(n) + "\n") // in the form of the kernel
		require.NoError(t, err)
		require.Equal(t, n, again)
		require.Equal(t, strconv.Itoa(n), digits(text))
	})
}

// digits returns the number in a text that has nothing else, in the form of Itoa.
func digits(text string) string {
	s := strings.TrimLeft(strings.TrimSpace(text), "+-0")
	if s == "" {
		return "0"
	}
	return s
}

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
		"one too large for 64 bits":           {"TcpExt: ListenDrops\nTcpExt: 9223372036854775808\n", unknown},
		"negative":                            {"TcpExt: ListenDrops\nTcpExt: -1\n", unknown},
		"minus nothing":                       {"TcpExt: ListenDrops\nTcpExt: -0\n", unknown},
		"a word":                              {"TcpExt: ListenDrops\nTcpExt: many\n", unknown},
		"hexadecimal":                         {"TcpExt: ListenDrops\nTcpExt: 0x10\n", unknown},
		"the column missing":                  {"TcpExt: A B\nTcpExt: 1 2\n", unknown},
		"its value missing":                   {"TcpExt: A ListenDrops\nTcpExt: 1\n", unknown},
		"all values missing":                  {"TcpExt: ListenDrops\nTcpExt:\n", unknown},
		"the line of values missing":          {"TcpExt: ListenDrops\n", unknown},
		"cut after the names":                 {"TcpExt: ListenDrops", unknown},
		"the names missing":                   {"TcpExt:\nTcpExt: 1\n", unknown},
		"the column in another table only":    {"TcpExt: A\nTcpExt: 1\nIpExt: ListenDrops\nIpExt: 2\n", unknown},
		"the table missing":                   {"IpExt: ListenDrops\nIpExt: 2\n", unknown},
		"a table whose name ends in this one": {"XTcpExt: ListenDrops\nXTcpExt: 2\n", unknown},
		"no colon":                            {"TcpExt ListenDrops\nTcpExt 2\n", unknown},
		"nothing":                             {"", unknown},
		"newlines":                            {"\n\n\n", unknown},
	} {
		require.Equal(t, row.want, netstatCounter(row.text, "TcpExt", "ListenDrops"), name)
	}
	require.EqualValues(t, 5, netstatCounter(tables, "IpExt", "ListenDrops"))

	// A table that is wider than that of any kernel; the test reads its last column.
	wide := strings.Repeat("Column ", 100_000) + "ListenDrops"
	values := strings.Repeat("1 ", 100_000) + "42"
	require.EqualValues(t, 42, netstatCounter("TcpExt: "+wide+"\nTcpExt: "+values+"\n", "TcpExt", "ListenDrops"))
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
		got := netstatCounter(text, table, column)
		require.Equal(t, plainCounter(text, table, column), got)
		require.GreaterOrEqual(t, got, int64(unknown))

		other := "IpExt: ListenDrops\nIpExt: 987654321\n"
		require.Equal(t, got, netstatCounter(other+text, table, column), "another table before it")
		if text == "" || strings.HasSuffix(text, "\n") {
			require.Equal(t, got, netstatCounter(text+other, table, column), "another table after it")
			before := "TcpExt: First ListenDrops Last\nTcpExt: 1 2 3\n"
			require.EqualValues(t, 2, netstatCounter(before+text, table, column), "the first pair of lines counts")
		}
		if got != unknown {
			require.Contains(t, text, strconv.FormatInt(got, 10))
		}
	})
}

// plainCounter is another implementation of netstatCounter. It collects all lines of
// the table, then splits the first two into columns.
func plainCounter(text, table, column string) int64 {
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		if rest, ok := strings.CutPrefix(line, table+":"); ok {
			lines = append(lines, rest)
		}
	}
	if len(lines) < 2 {
		return unknown
	}
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	for i, name := range names {
		if name != column {
			continue
		}
		if i >= len(values) {
			return unknown
		}
		n, err := strconv.ParseInt(values[i], 10, 64)
		if err != nil || strings.Trim(values[i], "0123456789") != "" {
			return unknown
		}
		return n
	}
	return unknown
}

func TestSystemAnswers(t *testing.T) {
	s, err := ReadSystem()
	if !systemTells() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, System{
			Ceiling: unknown, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
			ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
		}, s)
	} else {
		require.NoError(t, err)
		predicted, err := PredictBacklog(-1)
		if err == nil {
			require.Equal(t, predicted.Ceiling, s.Ceiling)
		}
	}
	some := System{Ceiling: 128, Knob: "k", SYNBacklog: unknown, ListenDrops: unknown}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "system", some)
	require.Contains(t, log.String(), "system.ceiling=128 system.knob=k system.synCookies=0 system.abortOnOverflow=0 "+
		"system.migrateRequests=0 system.listenOverflows=0 system.reqQFullDrop=0 system.reqQFullDoCookies=0\n")
	text, err := json.Marshal(some)
	require.NoError(t, err)
	require.Equal(t, `{"ceiling":128,"knob":"k","synBacklog":null,"synCookies":0,"abortOnOverflow":0,`+
		`"migrateRequests":0,"listenOverflows":0,"listenDrops":null,"reqQFullDrop":0,"reqQFullDoCookies":0}`, string(text))
}

func TestSysctlNumber(t *testing.T) {
	word := binary.NativeEndian.AppendUint32(nil, 1400507)
	for name, row := range map[string]struct {
		raw  []byte
		want uint32
		ok   bool
	}{
		"four bytes":     {word, 1400507, true},
		"one byte, true": {[]byte{1}, 1, true},
		"one byte":       {[]byte{0}, 0, true},
		"nothing":        {nil, 0, false},
		"two bytes":      {[]byte{1, 0}, 0, false},
		"eight bytes":    {binary.NativeEndian.AppendUint64(nil, 2_097_152), 2_097_152, true},
		"eight, too big": {binary.NativeEndian.AppendUint64(nil, math.MaxUint64), math.MaxUint32, true},
		"nine bytes":     {make([]byte, 9), 0, false},
	} {
		n, ok := sysctlNumber(row.raw)
		require.Equal(t, row.ok, ok, name)
		require.Equal(t, row.want, n, name)
	}
}

func TestSysctlCount(t *testing.T) {
	for _, tt := range []struct {
		rule string
		n    uint32
		want int
	}{
		{"zero is a number", 0, 0},
		{"a number is kept", 128, 128},
		{"FreeBSD's highest is kept", math.MaxUint32 / 3, 1431655765},
		{"the largest int is kept", math.MaxInt32, math.MaxInt32},
		{"a larger number becomes the largest int", math.MaxInt32 + 1, math.MaxInt32},
		{"the largest uint32 does not become -1, which means unknown", math.MaxUint32, math.MaxInt32},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			require.Equal(t, tt.want, sysctlCount(tt.n))
		})
	}
}

// A negative ceiling is not a large one. DragonFly accepts -1 and then refuses every client.
func TestNegativeCeiling(t *testing.T) {
	for _, tt := range []struct {
		n    uint32
		want int
	}{
		{0, 0}, {128, 128}, {math.MaxUint32 / 3, 1431655765}, {math.MaxInt32, math.MaxInt32},
		{math.MaxInt32 + 1, unknown}, {math.MaxUint32, unknown},
	} {
		n, err := sysctlCeiling(tt.n)
		require.Equal(t, tt.want, n)
		require.Equal(t, tt.want == unknown, errors.Is(err, errNegative), "%d: %v", tt.n, err)
	}
}
