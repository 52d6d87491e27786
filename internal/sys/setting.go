package sys

import (
	"encoding/binary"
	"math"
	"strconv"
	"strings"
)

// ParseNumber parses the text of a /proc/sys file that holds one number. The kernel ends
// the text with a newline.
func ParseNumber(text string) (int, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
	if err != nil {
		return Unknown, err
	}
	if n < 0 {
		return Unknown, &strconv.NumError{Func: "ParseInt", Num: text, Err: strconv.ErrRange}
	}
	return int(n), nil
}

// sysctlNumber returns an unsigned number of sysctl(3), capped at 32 bits. A boolean has one
// byte, and a long on 64-bit systems has eight.
func sysctlNumber(raw []byte) (n uint32, ok bool) {
	switch len(raw) {
	case 1:
		return uint32(raw[0]), true
	case 4:
		return binary.NativeEndian.Uint32(raw), true
	case 8:
		return uint32(min(binary.NativeEndian.Uint64(raw), math.MaxUint32)), true
	}
	return 0, false
}

// sysctlCount returns an unsigned number of sysctl(3) as a number of connections.
func sysctlCount(n uint32) int { return int(min(n, math.MaxInt32)) }
