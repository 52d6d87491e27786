package intake

import (
	"cmp"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// The BPF programs that pick a member of a SO_REUSEPORT group for each SYN. The program of a
// question is in question_linux.go, and the filter that drops SYNs in stop_linux.go.

// Instructions of classic BPF, linux/filter.h.
const (
	BpfRandom uint32 = 0xfffff000 + 56 // SKF_AD_OFF + SKF_AD_RANDOM
	// mostExcluded is the number of instructions that a program has for excluded members.
	mostExcluded = maxProgram - 3
)

// closing returns the program for the close of listeners that drain, of a group of n members
// of which own are such listeners. It does not need to know their indices. At each close the
// last member of the array takes the place of the one that closes. So members with an index
// below n-c keep it while c listeners close. spare is the number of closes for which the
// program is right.
//
// The last listener of this process leaves its program behind. If all other members answer,
// that program picks an index that no member has after the close, and the kernel uses its
// hash. full is the number of members that are silent because their queue is full.
//
// moves is true if the only member that answers is the last, and other members do not
// answer. The program is right until the close only.
func closing(n int, answers []int, own, full int) (p []unix.SockFilter, spare int, moves bool) {
	last := n - 1
	if own == 1 && !slices.Contains(answers, last) {
		return picks(answers, n), 0, false // no member that answers moves
	}
	if own == 1 && n-own-len(answers) <= full {
		return only(last), 0, false
	}
	for spare = max(own-1, 1); spare > 0; spare-- {
		stay := slices.DeleteFunc(slices.Clone(answers), func(i int) bool { return i >= n-spare })
		if len(stay) > 0 && (2*len(stay) >= len(answers) || spare == 1) {
			return picks(stay, n), spare, false
		}
	}
	return only(last), 0, true
}

// only returns a program that picks one index.
func only(index int) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(index)}}
}

// picks returns a program that picks one of the given indices of n members at random. It
// returns nil if there is none, or if too many other members are left out.
func picks(indices []int, n int) []unix.SockFilter {
	var excluded []int
	for i := range n {
		if !slices.Contains(indices, i) {
			excluded = append(excluded, i)
		}
	}
	return Program(n, excluded)
}

// Program returns a program that picks one of n members at random, except the excluded
// ones. It returns nil if no member is left or if too many are excluded.
//
// The program takes a random number below the number of members that are left. It then
// adds 1 for each excluded index that is not above the number, in ascending order.
func Program(n int, excluded []int) (p []unix.SockFilter) {
	excluded = slices.Sorted(slices.Values(excluded))
	left := n - len(excluded)
	if left <= 0 || 2*len(excluded) > mostExcluded {
		return nil
	}
	p = append(p,
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: BpfRandom},
		unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(left)})
	for _, e := range excluded {
		p = append(p,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: uint32(e), Jf: 1},
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_ADD | unix.BPF_K, K: 1})
	}
	return append(p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_A})
}

// AttachTo attaches a program to the SO_REUSEPORT group of a socket.
func AttachTo(k *sys.Calls, raw syscall.RawConn, p []unix.SockFilter) (err error) {
	cerr := raw.Control(func(fd uintptr) { err = k.AttachProgram(int(fd), p) })
	return cmp.Or(cerr, err)
}

// detachFrom detaches the program from the SO_REUSEPORT group of a socket. Kernels before
// 5.3 cannot do that. There detachFrom attaches a program that picks no listener.
func detachFrom(k *sys.Calls, raw syscall.RawConn) (err error) {
	cerr := raw.Control(func(fd uintptr) {
		if err = k.DetachProgram(int(fd)); err != nil {
			err = k.AttachProgram(int(fd), []unix.SockFilter{noMember})
		}
	})
	return cmp.Or(cerr, err)
}
