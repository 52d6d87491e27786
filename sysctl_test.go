package acceptq

import (
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
		{"the kernel's newline is no part of it", "4096\n", 4096, nil},
		{"none is needed", "128", 128, nil},
		{"space around it is no part of it", " \t128 \n\n", 128, nil},
		{"zero is a number", "0\n", 0, nil},
		{"the largest is an int's", "2147483647\n", math.MaxInt32, nil},
		{"more is out of range", "2147483648\n", unknown, strconv.ErrRange},
		{"much more is out of range", "99999999999999999999\n", unknown, strconv.ErrRange},
		{"less than nothing is out of range", "-1\n", unknown, strconv.ErrRange},
		{"nothing is no number", "", unknown, strconv.ErrSyntax},
		{"a line of nothing is no number", "\n", unknown, strconv.ErrSyntax},
		{"two numbers are not one", "4096\t87380\n", unknown, strconv.ErrSyntax},
		{"hexadecimal is not read", "0x80\n", unknown, strconv.ErrSyntax},
		{"words are no number", "net.core.somaxconn = 128\n", unknown, strconv.ErrSyntax},
		{"a NUL is no space", "128\x00", unknown, strconv.ErrSyntax},
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
		again, err := parseSysctl(strconv.Itoa(n) + "\n") // as the kernel would write it
		require.NoError(t, err)
		require.Equal(t, n, again)
		require.Equal(t, strconv.Itoa(n), digits(text))
	})
}

// digits is the number in a text that holds nothing else, as Itoa writes it.
func digits(text string) string {
	s := strings.TrimLeft(strings.TrimSpace(text), "+-0")
	if s == "" {
		return "0"
	}
	return s
}
