package intake

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// No system call reports the order of a SO_REUSEPORT group, but the kernel can be asked.
// A program on the group sends one SYN to each index. Each SYN comes from a client with a
// port of its own. The SYN has a low TTL, and the client ignores every answer whose TTL is
// below 255, so no connection is made:
//   - A member that answers sends a SYN-ACK. The client drops it and counts the drop.
//   - A listener of this process drops the SYN and counts the drop. It drops all SYNs
//     because it drains, or those with a low TTL because it is marked.
//   - Any other member is silent. It drains too, or its queue is full.

const (
	// clientsAtOnce is the maximum number of clients that a question has at a time. Each
	// needs a descriptor.
	clientsAtOnce = 64
	// On the loopback interface the kernel usually answers before connect(2) returns. A
	// question waits for late answers, longer if there is no answer at all.
	questionLate = time.Millisecond
	questionWait = 10 * time.Millisecond
	questionLook = 200 * time.Microsecond // the pause between two checks
	maxProgram   = 4096                   // BPF_MAXINSNS, the maximum length of a program
)

// errNotAsked is the error of a question that has not reached a listener of this process.
// That is so if the group gets no clients by the loopback interface, for example because it
// is bound to a device, or because another group has the loopback address.
var errNotAsked = errors.New("the listener did not get the SYN of a question")

// A question asks a SO_REUSEPORT group. Its methods must be called in the network namespace
// of the group.
type question struct {
	calls  *sys.Calls
	to     netip.AddrPort // where the group listens, on the loopback interface
	device uint32         // the zone of to
	n      int            // the number of indices
	ttl    int            // the TTL of a SYN
	// deaf means that own sends with a TTL of 255, and other members probably too, so that a
	// client needs a filter to ignore them.
	deaf   bool
	own    []*steered // the listeners that must be silent
	attach func(p []unix.SockFilter) error
	// rest is the program for all other clients. It may be out of date, since another
	// process may have replaced it. So the first answers replace it.
	rest []unix.SockFilter
}

// ask returns the indices that answer, in ascending order. A nil error means that the SYNs
// of the question have reached each listener of own, so none of these is among the answers.
func (q *question) ask(ctx context.Context) (answers []int, err error) {
	before := make([]uint32, len(q.own))
	for i, o := range q.own {
		if before[i], err = dropsOf(q.calls, o.raw); err != nil {
			return nil, err
		}
	}
	// The newest members are the last, and they are the least likely to drain.
	for high := q.n; high > 0; high -= clientsAtOnce {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var indices []int
		for i := high - 1; i >= max(high-clientsAtOnce, 0); i-- {
			indices = append(indices, i)
		}
		some, err := q.askSome(indices, answers)
		if err != nil {
			return nil, err
		}
		answers = append(answers, some...)
	}
	slices.Sort(answers)
	for i, o := range q.own {
		if now, err := dropsOf(q.calls, o.raw); err != nil || now == before[i] {
			return nil, errors.Join(errNotAsked, err)
		}
	}
	return answers, nil
}

// A questionClient is the client of one index.
type questionClient struct {
	index    int
	fd       int
	port     uint16
	answered bool
}

// askSome asks some indices. known are other indices that answer.
func (q *question) askSome(indices, known []int) (answers []int, err error) {
	clients, err := q.clients(indices)
	defer q.end(clients)
	if err != nil {
		return nil, err
	}
	before, err := q.drops()
	if err != nil {
		return nil, err
	}
	if err := q.attach(q.program(clients)); err != nil {
		return nil, err
	}
	answered := func() []int {
		var all []int
		for _, c := range clients {
			if c.answered {
				all = append(all, c.index)
			}
		}
		return all
	}
	for _, c := range clients {
		if err := q.connect(c); err != nil {
			return nil, err
		}
		if len(known) > 0 {
			continue
		}
		if err := q.read(c); err != nil {
			return nil, err
		}
		if c.answered {
			known = answered()
			q.rest = only(c.index)
			if err := q.attach(q.program(clients)); err != nil {
				return nil, err
			}
		}
	}
	began := time.Now()
	for waited := false; ; waited = true {
		left := 0
		for _, c := range clients {
			if err := q.read(c); err != nil {
				return nil, err
			}
			if !c.answered {
				left++
			}
		}
		now, err := q.drops()
		if err != nil {
			return nil, err
		}
		// Each SYN that has no answer is accounted for by a listener of own.
		took := time.Since(began)
		if left <= int(now-before) || took > questionWait || took > questionLate && left < len(clients) {
			return answered(), nil
		}
		if !waited && left < len(clients) {
			q.rest = picks(append(slices.Clone(known), answered()...), q.n)
			if err := q.attach(q.program(clients)); err != nil {
				return nil, err
			}
		}
		time.Sleep(questionLook)
	}
}

// read notes whether the client c has got an answer.
func (q *question) read(c *questionClient) error {
	if c.answered {
		return nil
	}
	n, err := dropsOfDescriptor(q.calls, c.fd)
	c.answered = n > 0
	return err
}

// drops returns how many packets all listeners of own have dropped, as the kernel counts
// them: the number wraps.
func (q *question) drops() (sum uint32, err error) {
	for _, o := range q.own {
		n, err := dropsOf(q.calls, o.raw)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// locate returns the index of the only listener of own, one of silent. It divides silent
// into halves.
func (q *question) locate(ctx context.Context, silent []int) (index int, err error) {
	for len(silent) > 1 {
		half := silent[:len(silent)/2]
		reached, err := q.reaches(ctx, half)
		if err != nil {
			return -1, err
		}
		if reached {
			silent = half
		} else {
			silent = silent[len(half):]
		}
	}
	if reached, err := q.reaches(ctx, silent); err != nil || !reached {
		return -1, errors.Join(errNotAsked, err)
	}
	return silent[0], nil
}

// reaches reports whether a listener of own has one of the indices.
func (q *question) reaches(ctx context.Context, indices []int) (bool, error) {
	clients, err := q.clients(indices[:min(len(indices), clientsAtOnce)])
	defer q.end(clients)
	if err != nil {
		return false, err
	}
	before, err := q.drops()
	if err != nil {
		return false, err
	}
	if err := q.attach(q.program(clients)); err != nil {
		return false, err
	}
	for _, c := range clients {
		if err := q.connect(c); err != nil {
			return false, err
		}
	}
	for end := time.Now().Add(questionLate); ; time.Sleep(questionLook) {
		now, err := q.drops()
		if err != nil || now != before {
			return err == nil, err
		}
		if time.Now().After(end) || ctx.Err() != nil {
			break
		}
	}
	if rest := indices[len(clients):]; len(rest) > 0 {
		return q.reaches(ctx, rest)
	}
	return false, ctx.Err()
}

// clients makes a client for each index. The caller must end the clients, even if there is
// an error.
func (q *question) clients(indices []int) (all []*questionClient, err error) {
	for _, i := range indices {
		fd, port, err := q.calls.ClientSocket(q.sockaddr(0), q.ttl, q.deaf)
		if err != nil {
			return all, err
		}
		all = append(all, &questionClient{index: i, fd: fd, port: port})
	}
	return all, nil
}

// end closes clients and removes what they have left at the members.
func (q *question) end(clients []*questionClient) {
	for _, c := range clients {
		if c.answered {
			q.takeBack(c)
		}
		unix.Close(c.fd)
	}
}

// connect sends the SYN of a client.
func (q *question) connect(c *questionClient) error {
	err := q.calls.Connect(c.fd, q.sockaddr(q.to.Port()))
	if errors.Is(err, unix.EINPROGRESS) {
		return nil
	}
	return os.NewSyscallError("connect", err)
}

// sockaddr returns the address of the group with another port.
func (q *question) sockaddr(port uint16) unix.Sockaddr {
	if q.to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(port), Addr: q.to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(port), Addr: q.to.Addr().As16(), ZoneId: q.device}
}

// takeBack makes the member that has answered the client c forget the handshake. Without
// it, the member would keep the handshake for a second, until it repeats its SYN-ACK and
// gets a reset. The second SYN has a number within the window of the first, which ends a
// handshake: tcp_check_req in net/ipv4/tcp_minisocks.c.
func (q *question) takeBack(c *questionClient) {
	if q.calls.Disconnect(c.fd, q.sockaddr(c.port)) == nil {
		q.calls.Connect(c.fd, q.sockaddr(q.to.Port()))
	}
}

// Offsets in a packet for a classic BPF program, linux/filter.h. A program of a SO_REUSEPORT
// group sees a packet from behind its TCP header on.
const bpfNetwork uint32 = 0xfff00000 // SKF_NET_OFF: the IP header

const (
	ipv4Source = 12
	ipv4End    = 20 // without options, which the SYN of a question does not have
	ipv6Source = 8
	ipv6End    = 40
)

// program sends the SYN of each client to the index of that client, and all other SYNs to
// where rest sends them.
func (q *question) program(clients []*questionClient) (p []unix.SockFilter) {
	load := func(size uint16, offset int) {
		p = append(p, unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: bpfNetwork + uint32(offset)})
	}
	// A conditional jump reaches 255 instructions, so each condition has a jump of its own.
	var elsewhere []int
	demand := func(value uint32) {
		elsewhere = append(elsewhere, len(p)+1)
		p = append(p,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: 1},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA})
	}
	load(unix.BPF_B, 0)
	p = append(p, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K, K: 4})
	source, end, address := ipv6Source, ipv6End, q.to.Addr().AsSlice()
	if q.to.Addr().Is4() {
		source, end = ipv4Source, ipv4End
		demand(4)
	} else {
		demand(6)
	}
	for i := 0; i < len(address); i += 4 {
		load(unix.BPF_W, source+i)
		demand(binary.BigEndian.Uint32(address[i:]))
	}
	load(unix.BPF_H, end) // the source port
	for _, c := range clients {
		p = append(p,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(c.port), Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: uint32(c.index)})
	}
	for _, i := range elsewhere {
		p[i].K = uint32(len(p) - i - 1)
	}
	if len(q.rest) == 0 || len(p)+len(q.rest) > maxProgram {
		return append(p, noMember)
	}
	return append(p, q.rest...)
}

// noMember is an instruction that picks no member, so that the kernel uses its hash.
var noMember = unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff}

// dropsOf returns the number of packets that a socket has dropped. It wraps at 32 bits.
func dropsOf(k *sys.Calls, raw interface{ Control(func(fd uintptr)) error }) (n uint32, err error) {
	if cerr := raw.Control(func(fd uintptr) { n, err = dropsOfDescriptor(k, int(fd)) }); cerr != nil {
		return 0, sys.Cause(cerr)
	}
	return n, err
}

func dropsOfDescriptor(k *sys.Calls, fd int) (uint32, error) {
	var p [sys.MemInfoEnd]byte
	n, err := k.Getsockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, p[:])
	if err == nil && n < len(p) {
		err = unix.EBADMSG
	}
	return binary.NativeEndian.Uint32(p[sys.MemInfoDrops:]), os.NewSyscallError("getsockopt", err)
}

// takeTurn waits until no other process asks the group, and returns a function that ends the
// turn. Two questions at a time would replace each other's program.
// Two drains that begin at the same time would each take the other for a member that serves.
// A turn is a name in the abstract namespace of unix(7), which the kernel frees if the
// process dies. If ctx ends first, the caller goes on without it.
func takeTurn(k *sys.Calls, ctx context.Context, what string, key groupKey) (end func()) {
	fd, err := k.UnixSocket()
	if err != nil {
		return func() {}
	}
	name := fmt.Sprintf("@acceptq/%s/%v/%v/%d/%d", what, key.at, key.v6only, key.device, key.uid)
	for {
		err := k.Reserve(fd, name)
		if !errors.Is(err, unix.EADDRINUSE) || ctx.Err() != nil {
			return func() { unix.Close(fd) }
		}
		time.Sleep(questionLook)
	}
}
