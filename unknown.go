package acceptq

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"slices"

	"github.com/acceptq/acceptq/internal/sys"
)

// unknown is the value of a number that the system does not report. It is not 0,
// because a queue of unknown length is not an empty queue.
const unknown = sys.Unknown

// nothingKnown is the text of an account or a reading without any known number.
const nothingKnown = "nothing known"

// orNothing returns v, or nothing if v is zero. A zero value was never filled in,
// because a real account or reading always has a number that is not 0.
func orNothing[T comparable](v, nothing T) T {
	var zero T
	if v == zero {
		return nothing
	}
	return v
}

// count is a number in JSON. null means unknown.
type count int64

func (c count) MarshalJSON() ([]byte, error) {
	if c == unknown {
		return []byte("null"), nil
	}
	return json.Marshal(int64(c))
}

func (c *count) UnmarshalJSON(text []byte) error {
	n := int64(unknown) // null does not change it
	err := json.Unmarshal(text, &n)
	*c = count(max(n, unknown))
	return err
}

// int returns the number as an int, which may have 32 bits.
func (c count) int() int { return saturate(int64(c)) }

// String returns the number, or "unknown".
func (c count) String() string {
	if c == unknown {
		return "unknown"
	}
	return fmt.Sprint(int64(c))
}

// logKnown returns a group of attributes for log/slog, without the unknown numbers.
func logKnown(attrs ...slog.Attr) slog.Value {
	return slog.GroupValue(slices.DeleteFunc(attrs, func(a slog.Attr) bool {
		return a.Value.Equal(slog.Int64Value(unknown))
	})...)
}

// saturate caps a number of connections at the largest int, which may have 32 bits.
func saturate(n int64) int { return int(min(n, math.MaxInt)) }
