package intake

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/testkit"
)

// run interprets a BPF program made by steering, for every possible random number, and
// counts the results.
func run(t *testing.T, p []unix.SockFilter) map[uint32]int {
	t.Helper()
	results := map[uint32]int{}
	for draw := range uint32(5040) { // divisible by 1 to 10
		var a uint32
		for pc := 0; ; pc++ {
			switch i := p[pc]; i.Code {
			case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
				require.Equal(t, BpfRandom, i.K)
				a = draw
			case unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K:
				a %= i.K
			case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
				if a >= i.K {
					pc += int(i.Jt)
				} else {
					pc += int(i.Jf)
				}
				continue
			case unix.BPF_ALU | unix.BPF_ADD | unix.BPF_K:
				a += i.K
				continue
			case unix.BPF_RET | unix.BPF_A:
				results[a]++
			case unix.BPF_RET | unix.BPF_K:
				results[i.K]++
			default:
				t.Fatalf("instruction %+v", i)
			}
			if p[pc].Code&7 == unix.BPF_RET {
				break
			}
		}
	}
	return results
}

// Every member has the same share, except the excluded ones, which have none.
func TestProgramPicksAllExceptTheExcluded(t *testing.T) {
	for n := 1; n <= min(6+testkit.Factor(), 10); n++ {
		for set := range 1 << n {
			var excluded, left []int
			for i := range n {
				if set>>i&1 != 0 {
					excluded = append(excluded, i)
				} else {
					left = append(left, i)
				}
			}
			rand.Shuffle(len(excluded), func(i, j int) { excluded[i], excluded[j] = excluded[j], excluded[i] })
			p := Program(n, excluded)
			if len(left) == 0 {
				require.Nil(t, p)
				continue
			}
			want := map[uint32]int{}
			for _, i := range left {
				want[uint32(i)] = 5040 / len(left)
			}
			require.Equal(t, want, run(t, p), "%d members but %v", n, excluded)
		}
	}
	many := make([]int, 2046)
	for i := range many {
		many[i] = i
	}
	require.Len(t, Program(4096, many), 4095, "the kernel takes 4096")
	require.Nil(t, Program(4096, append(many, 2046)))
}

// The program for a close picks no listener that drains, whatever the order of the group and
// of the closes is, as long as it promises to be right.
func TestProgramIsRightWhileListenersClose(t *testing.T) {
	const drains, other, serves = 0, 1, 2
	for range 100 * testkit.Factor() {
		n := 1 + rand.IntN(12)
		array := make([]int, n)
		for i := range array {
			array[i] = rand.IntN(3)
		}
		array[rand.IntN(n)] = drains
		count := func(kind int) (c int) {
			for _, a := range array {
				if a == kind {
					c++
				}
			}
			return c
		}
		var answers []int
		for i, a := range array {
			if a == serves {
				answers = append(answers, i)
			}
		}
		own, silent := count(drains), count(other)
		if len(answers) == 0 {
			continue
		}
		what := fmt.Sprint(array)
		p, spare, moves := closing(n, answers, own, 0)
		for target := range run(t, p) {
			require.Equal(t, serves, array[target], what)
		}
		require.Equal(t, moves, len(answers) == 1 && answers[0] == n-1 && (own > 1 || silent > 0), what)
		if moves {
			continue
		}
		closes := max(spare, 1)
		require.LessOrEqual(t, closes, own, what)
		for range closes {
			var mine []int
			for i, a := range array {
				if a == drains {
					mine = append(mine, i)
				}
			}
			i := mine[rand.IntN(len(mine))]
			array[i] = array[len(array)-1]
			array = array[:len(array)-1]
			for target := range run(t, p) {
				if int(target) < len(array) {
					require.Equal(t, serves, array[target], "%s after a close: %v", what, array)
				} else { // the hash picks any member
					require.False(t, slices.ContainsFunc(array, func(a int) bool { return a != serves }), "%s after a close: %v", what, array)
				}
			}
		}
	}
}
