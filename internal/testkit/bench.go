package testkit

import (
	"slices"
	"testing"
	"time"
)

// The benchmarks here compare several sides. Each reports ratios of one run in which
// the sides alternate, so that changes in the load of the machine affect all of them.
// The first two sides are the same: the difference of their ratio from 1 is the noise.

// A Side runs one of the compared operations. It returns the time that this took.
type Side = func() time.Duration

// Ratios runs the sides in turn. For each side after the first it returns the median of
// the ratio of its time to that of the first side in the same turn.
func Ratios(b *testing.B, sides ...Side) []float64 {
	var parts [][]float64
	for range sides {
		parts = append(parts, nil)
	}
	took := make([]time.Duration, len(sides))
	for turn := 0; b.Loop(); turn++ {
		for i := range sides {
			first := (turn + i) % len(sides)
			took[first] = sides[first]()
		}
		for i := range sides {
			parts[i] = append(parts[i], float64(took[i])/float64(took[0]))
		}
	}
	b.ReportMetric(0, "ns/op") // the time of all sides together has no meaning
	var medians []float64
	for _, p := range parts[1:] {
		slices.Sort(p)
		medians = append(medians, p[len(p)/2])
	}
	return medians
}
