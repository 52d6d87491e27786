package acceptq

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// message returns a netlink message.
func message(kind uint16, body []byte) []byte {
	p := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body)+3)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)+len(body)))
	binary.NativeEndian.PutUint16(p[4:], kind)
	p = append(p, body...)
	return append(p, make([]byte, -len(p)&3)...)
}

func TestParseDump(t *testing.T) {
	msg := make([]byte, diagMsgSize)
	msg[diagFamily] = unix.AF_INET
	odd := append(msg[:diagMsgSize:diagMsgSize], 5, 0, 0, 0, 1) // with an attribute of one byte
	binary.NativeEndian.PutUint16(odd[diagMsgSize:], 5)
	one := message(unix.SOCK_DIAG_BY_FAMILY, msg)
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	number := func(n int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }
	join := func(parts ...[]byte) (p []byte) {
		for _, part := range parts {
			p = append(p, part...)
		}
		return p
	}
	for _, test := range []struct {
		name string
		p    []byte
		rows int
		done bool
		err  error
	}{
		{"nothing", nil, 0, false, nil},
		{"a row, and more to come", one, 1, false, nil},
		{"the end", end, 0, true, nil},
		{"rows and the end", join(one, one, end), 2, true, nil},
		{"data after the end are ignored", join(one, end, []byte{1}), 1, true, nil},
		{"other messages are skipped", join(message(unix.NLMSG_NOOP, nil), one), 1, false, nil},
		{"a row of odd length", join(message(unix.SOCK_DIAG_BY_FAMILY, odd), one), 2, false, nil},
		{"a last row without padding", join(one, message(unix.SOCK_DIAG_BY_FAMILY, odd)[:unix.SizeofNlMsghdr+len(odd)]), 2, false, nil},
		{"a short row", join(one, message(unix.SOCK_DIAG_BY_FAMILY, msg[:diagMsgSize-1])), 0, false, unix.EBADMSG},
		{"an error", message(unix.NLMSG_ERROR, number(-int32(unix.ENOENT))), 0, false, unix.ENOENT},
		{"an error without a number", message(unix.NLMSG_ERROR, nil), 0, false, unix.EBADMSG},
		{"half a header", one[:15], 0, false, unix.EBADMSG},
		{"half a row", one[:20], 0, false, unix.EBADMSG},
		{"a length of 0", make([]byte, 16), 0, false, unix.EBADMSG},
		{"a length beyond the data", binary.NativeEndian.AppendUint32(nil, 1<<32-1), 0, false, unix.EBADMSG},
	} {
		t.Run(test.name, func(t *testing.T) {
			rows := 0
			done, err := parseDump(test.p, func(row) { rows++ })
			if test.err != nil {
				require.ErrorIs(t, err, test.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.rows, rows)
			require.Equal(t, test.done, done)
		})
	}
}

func keepAll(row) bool { return true }

// A dumpCall is the seam of a kernel for sock_diag.
type dumpCall = func(request []byte) (diagAnswer, error)

// listing returns a dumpCall whose answer has these rows.
func listing(rows ...[]byte) dumpCall {
	return answered(func(p []byte) (n int, err error) {
		for _, row := range rows {
			n += copy(p[n:], message(unix.SOCK_DIAG_BY_FAMILY, row))
		}
		return n + copy(p[n:], message(unix.NLMSG_DONE, make([]byte, 4))), nil
	})
}

// answered returns a dumpCall whose answer has the datagrams that receive returns.
func answered(receive func(p []byte) (int, error)) dumpCall {
	return func([]byte) (diagAnswer, error) { return diagAnswer{receive, func() {}}, nil }
}

// statesOf returns the states that a request selects.
func statesOf(request []byte) uint32 {
	return binary.NativeEndian.Uint32(request[unix.SizeofNlMsghdr+4:])
}

// If the kernel never ends a dump, reading it still ends, so a drain does not hang.
func TestReadDumpEnds(t *testing.T) {
	row := message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, diagMsgSize))
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	for name, test := range map[string]struct {
		receive func(turn int, p []byte) (int, error)
		rows    int
		err     error
	}{
		"in two datagrams, after a signal": {func(turn int, p []byte) (int, error) {
			if turn == 1 {
				return 0, unix.EINTR
			}
			return copy(p, [][]byte{row, nil, end}[turn]), nil
		}, 1, nil},
		"nothing, forever":  {func(int, []byte) (int, error) { return 0, nil }, 0, unix.EBADMSG},
		"signals, forever":  {func(int, []byte) (int, error) { return 0, unix.EINTR }, 0, context.DeadlineExceeded},
		"no rows, forever":  {func(_ int, p []byte) (int, error) { return copy(p, message(unix.NLMSG_NOOP, nil)), nil }, 0, context.DeadlineExceeded},
		"no answer in time": {func(int, []byte) (int, error) { return 0, unix.EAGAIN }, 0, context.DeadlineExceeded},
		"an error half-way": {func(turn int, p []byte) (int, error) { return copy(p, [][]byte{row, end[:9]}[turn]), nil }, 0, unix.EBADMSG},
	} {
		t.Run(name, func(t *testing.T) {
			turn := -1
			rows, err := readDump(within(t, 10*time.Millisecond), keepAll, func(p []byte) (int, error) {
				turn++
				return test.receive(turn, p)
			})
			require.ErrorIs(t, err, test.err)
			require.Len(t, rows, test.rows)
		})
	}
}

func FuzzParseDump(f *testing.F) {
	one := message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, diagMsgSize))
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	f.Add([]byte(nil))
	f.Add(one)
	f.Add(append(one[:len(one):len(one)], end...))
	f.Add(message(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, []byte("odd")))
	f.Add(diagRequest{unix.AF_INET, 80, 1 << tcpSynRecv, 0}.message())
	f.Add(one[:30])
	f.Fuzz(func(t *testing.T, p []byte) {
		whole := string(p)
		size := 0
		done, err := parseDump(p, func(r row) { size += unix.SizeofNlMsghdr + diagMsgSize + len(r.info) })
		if string(p) != whole {
			t.Fatal("parseDump wrote into the datagram")
		}
		if err != nil && done {
			t.Fatal("an error together with the end")
		}
		if size > len(p) {
			t.Fatalf("%d bytes of rows out of %d", size, len(p))
		}
	})
}

// attributeOf returns an attribute of a row with its padding.
func attributeOf(kind uint16, value ...byte) []byte {
	p := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(value)))
	p = append(binary.NativeEndian.AppendUint16(p, kind), value...)
	return append(p, make([]byte, -len(p)&3)...)
}

func TestParseRow(t *testing.T) {
	p := make([]byte, diagMsgSize)
	p[diagFamily], p[diagState] = unix.AF_INET6, tcpListen
	copy(p[diagSource:], netip.MustParseAddr("2001:db8::1").AsSlice())
	copy(p[diagDest:], netip.MustParseAddr("::ffff:10.0.0.2").AsSlice())
	binary.BigEndian.PutUint16(p[diagLocal:], 80)
	binary.BigEndian.PutUint16(p[diagClient:], 4000)
	for i, offset := range []int{diagInterface, diagRqueue, diagWqueue, diagUID, diagInode} {
		binary.NativeEndian.PutUint32(p[offset:], uint32(i+1))
	}
	binary.NativeEndian.PutUint64(p[diagCookie:], 6)
	want := row{
		socketID: socketID{
			family: unix.AF_INET6, device: 1,
			local: netip.MustParseAddrPort("[2001:db8::1]:80"), client: netip.MustParseAddrPort("10.0.0.2:4000"),
		},
		state: tcpListen, rqueue: 2, wqueue: 3, uid: 4, inode: 5, cookie: 6,
	}
	got, err := parseRow(p)
	require.NoError(t, err)
	require.Equal(t, want, got)
	got, err = parseRow(slices.Concat(p, attributeOf(1, 1, 2, 3), attributeOf(diagSKV6Only, 1), attributeOf(diagInfo, 7, 8)))
	require.NoError(t, err)
	want.v6only, want.info = true, []byte{7, 8}
	require.Equal(t, want, got)

	copy(p[diagSource:], []byte{127, 0, 0, 1})
	p[diagFamily] = unix.AF_INET
	got, err = parseRow(p)
	require.NoError(t, err)
	require.Equal(t, netip.MustParseAddrPort("127.0.0.1:80"), got.local)
	for name, p := range map[string][]byte{
		"empty":                       nil,
		"short":                       p[:diagMsgSize-1],
		"an attribute too short":      slices.Concat(p, []byte{3, 0, 3, 0}),
		"an attribute beyond the row": slices.Concat(p, []byte{9, 9, 1, 0}),
	} {
		got, err := parseRow(p)
		require.ErrorIs(t, err, unix.EBADMSG, name)
		require.Zero(t, got, name)
	}
}

// dump finds the listeners and the connections of a port. Its rows keep what the kernel
// reported.
func TestDump(t *testing.T) {
	ln := listenIPv4(t, WithBacklog(7))
	client := dialed(t, ln, 1)[0]
	of := func(states uint32) []row {
		rows, err := realKernel.dump(t.Context(), diagRequest{unix.AF_INET, ln.Addr().(*net.TCPAddr).AddrPort().Port(), states, 1 << (diagInfo - 1)}, func(row) bool { return true })
		require.NoError(t, err)
		require.Len(t, rows, 1)
		return rows
	}
	l := of(1 << tcpListen)[0]
	require.EqualValues(t, inode(t, ln), l.inode)
	require.EqualValues(t, unix.AF_INET, l.family)
	require.Equal(t, ln.Addr().String(), l.local.String())
	require.EqualValues(t, 1, l.rqueue)
	require.EqualValues(t, 7, l.wqueue)
	require.EqualValues(t, os.Getuid(), l.uid)
	require.EqualValues(t, tcpListen, l.info[infoState])
	c := of(1 << tcpEstablished)[0]
	require.Zero(t, c.inode)
	require.Equal(t, client.LocalAddr().String(), c.client.String())
	require.EqualValues(t, tcpEstablished, c.info[infoState])
	require.NotZero(t, c.cookie)
}
