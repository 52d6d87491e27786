package sys

import (
	"encoding/binary"
	"errors"
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
		{"one more is out of range", "2147483648\n", Unknown, strconv.ErrRange},
		{"much more is out of range", "99999999999999999999\n", Unknown, strconv.ErrRange},
		{"a negative number is out of range", "-1\n", Unknown, strconv.ErrRange},
		{"an empty text is not a number", "", Unknown, strconv.ErrSyntax},
		{"an empty line is not a number", "\n", Unknown, strconv.ErrSyntax},
		{"two numbers are an error", "4096\t87380\n", Unknown, strconv.ErrSyntax},
		{"hexadecimal is an error", "0x80\n", Unknown, strconv.ErrSyntax},
		{"a text is not a number", "net.core.somaxconn = 128\n", Unknown, strconv.ErrSyntax},
		{"a NUL is not space", "128\x00", Unknown, strconv.ErrSyntax},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			n, err := ParseNumber(tt.text)
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
		n, err := ParseNumber(text)
		if err != nil {
			require.Equal(t, Unknown, n)
			require.True(t, errors.Is(err, strconv.ErrSyntax) || errors.Is(err, strconv.ErrRange), "%v", err)
			return
		}
		require.True(t, 0 <= n && n <= math.MaxInt32, "%d", n)
		again, err := ParseNumber(strconv.Itoa(n) + "\n") // in the form of the kernel
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
